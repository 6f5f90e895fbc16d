"""Plans against what small runs really use: messages of a step, and its peak memory.

    python benchmarks/plan.py [--quick]

Each run is a whole one on this machine's CPU: reader, augmentation, ShuffleBN, queue, engine. The
collectives of its last step are added up as they are called, DeepSpeed's and FSDP's among them, and
must be what the plan says to the byte. Memory is what is in use at the most during a step, and must
be within 10 % of the plan's (without what CUDA would reserve).

Prints a table and, as its last line, one JSON object. For each run E_MODEL_R, of engine E on R
ranks:

    E_MODEL_R_memory_ratio    planned over measured
    E_MODEL_R_bytes_equal     whether every kind of collective is exactly as planned
    torch
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The profiler would announce itself, and that it has not seen everything.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

from moco_scale.config import command_line
from moco_scale.demo.render import write_folder
from moco_scale.distributed.spawn import run_ranks
from moco_scale.planner.cluster import PRESETS
from moco_scale.planner.measure import CollectiveCounter, peak_of_step
from moco_scale.planner.plan import make_plan
from moco_scale.training.loop import train_step
from moco_scale.training.run import Run

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
QUICK = (("ddp", "resnet18", 2), ("fsdp", "vit_small", 2))
RUNS = (
    ("ddp", "resnet18", 1),
    ("ddp", "resnet18", 2),
    ("zero1", "resnet18", 2),
    ("zero2", "vit_small", 2),
    ("zero3", "resnet18", 2),
    ("fsdp", "resnet18", 2),
    ("fsdp", "vit_small", 2),
    ("ddp", "vit_small", 4),
)
LIMIT = 0.1
FLAGS = (
    *("--recipe", "v2", "--dataset", "images", "--image-size", "64", "--batch-size", "16"),
    *("--bn-group-size", "4", "--nce-k", "512", "--knn-freq", "0", "--num-workers", "0"),
)


def measure(flags: list[str]) -> tuple[dict[str, int], int]:
    """On one rank: bytes by collective of the last step, and the peak of memory in it."""
    counters = []

    def make() -> Callable[[], None]:
        run = Run(command_line.parse(flags))
        run.engine.moco.train()
        batches = run.loader(STEPS)

        def step() -> None:
            batch = next(batches)
            with CollectiveCounter() as counter:
                train_step(run, batch)
            counters.append(counter)

        return step

    peak = peak_of_step(make, STEPS - 2, 2)
    return dict(counters[-1].payload), peak


def flags_of(engine: str, model: str) -> list[str]:
    """Return flags for train.py and for a plan."""
    flags = [*FLAGS, "--model", model]
    if engine.startswith("zero"):
        return [*flags, "--deepspeed", str(ROOT / "ds_configs" / f"{engine}.json")]
    return [*flags, "--engine", engine]


def planned(engine: str, model: str, world: int) -> tuple[dict[str, int], int]:
    """The same from the plan."""
    config = command_line.parse(flags_of(engine, model))
    plan = make_plan(config, 1, world, PRESETS["a100"], images=1000, on_gpu=False)
    payload: Counter[str] = Counter()
    for collective in plan.collectives:
        payload[collective.kind] += collective.payload
    return dict(payload), sum(plan.memory.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    failed = 0
    print(f"{'run':24}{'planned MB':>12}{'measured':>10}{'ratio':>8}   bytes of collectives")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folder(root / "images", train_per_class=8, val_per_class=1, size=72)
        shard = [sys.executable, "-m", "moco_scale", "shard", "--source", str(root / "images")]
        subprocess.run(
            [*shard, "--out", str(root / "shards")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        for engine, model, world in QUICK if args.quick else RUNS:
            name = f"{engine}_{model}_{world}"
            flags = [*flags_of(engine, model), "--data-dir", str(root / "shards")]
            flags += ["--output-dir", str(root / name)]
            payload, peak = run_ranks(measure, world, flags)[0]
            wanted, memory = planned(engine, model, world)
            ratio, equal = memory / peak, payload == wanted
            failed += not equal or abs(ratio - 1) > LIMIT
            said = "equal" if equal else f"DIFFER: {payload}, planned {wanted}"
            print(
                f"{name:24}{memory / 1e6:>12.1f}{peak / 1e6:>10.1f}{ratio:>8.3f}   {said}",
                flush=True,
            )
            result |= {f"{name}_memory_ratio": round(ratio, 4), f"{name}_bytes_equal": equal}
    print(json.dumps(result | {"torch": torch.__version__}))
    if failed:
        raise SystemExit(f"{failed} plans are off")


if __name__ == "__main__":
    main()
