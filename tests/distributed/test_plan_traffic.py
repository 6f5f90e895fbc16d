"""What a plan says of messages is what a step sends, to the byte."""

from collections import Counter
from pathlib import Path

import pytest
from commands import TINY
from harness import run_ranks

from moco_scale.config import command_line
from moco_scale.planner.cluster import PRESETS
from moco_scale.planner.measure import CollectiveCounter
from moco_scale.planner.plan import make_plan
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

ENGINES: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "symmetric": ("--symmetric",),
    "spanning": ("--bn-group-size", "global"),
    "parts": ("--accumulation-steps", "2", "--bn-group-size", "2"),
    "sharded": ("--queue", "sharded", "--mask-same-image", "--symmetric"),
    "fsdp": ("--engine", "fsdp"),
    "fsdp-bf16": ("--engine", "fsdp", "--precision", "bf16"),
    **{f"zero{n}": ("--deepspeed", f"ds_configs/zero{n}.json") for n in range(4)},
}
QUICK = ("sharded", "spanning", "fsdp-bf16", "zero1")


def sent(flags: list[str]) -> dict[str, int]:
    """Bytes by collective of the third step on this rank."""
    run = Run(command_line.parse(flags))
    run.engine.moco.train()
    batches = run.loader(3)
    counters = []
    for batch in batches:
        with CollectiveCounter() as counter:
            train_step(run, batch)
        counters.append(counter)
    return dict(counters[-1].payload)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ENGINES]
)
def test_bytes_are_exact(name: str, tiny_shards: Path, tmp_path: Path, repository: Path) -> None:
    flags = [*TINY, *ENGINES[name], "--data-dir", str(tiny_shards)]
    flags = [str(repository / f) if f.startswith("ds_configs") else str(f) for f in flags]
    config = command_line.parse(flags)
    plan = make_plan(config, 1, 2, PRESETS["a100"], images=32)
    wanted: Counter[str] = Counter()
    for collective in plan.collectives:
        wanted[collective.kind] += collective.payload
    found = run_ranks(sent, 2, [*flags, "--output-dir", str(tmp_path / "out")])
    assert found == [dict(wanted)] * 2
