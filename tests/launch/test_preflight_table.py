"""``--preflight`` answers as a start does: the same verdict, in the same words."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from commands import TINY
from conftest import write_image
from harness import run_ranks

from moco_scale.commands import preflight
from moco_scale.config.command_line import parse
from moco_scale.config.schema import Config
from moco_scale.observe.phases import Phases
from moco_scale.training.loop import train
from moco_scale.training.run import Run
from moco_scale.utils.errors import UserError

READY = "ready"

FILES: dict[str, Any] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero0": {"gradient_clipping": 0.5, "activation_checkpointing": {"cpu_checkpointing": True}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "adam": {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}},
    "batch": {"train_batch_size": 999},
    "misspelt": {"zero_optimisation": {"stage": 1}},
    "inside": {"zero_optimization": {"stage": 1, "reduce_bucket_sise": 5}},
    "bf16": {"bf16": {"enabled": True}},
    "wandb": {"wandb": {"enabled": True}, "zero_optimization": {"stage": 1}},
    "moq": {"quantize_training": {"enabled": True}},
    "nvme": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
    "legacy": {"zero_optimization": {"stage": 1, "legacy_stage1": True}},
    "board": {
        "zero_optimization": {"stage": 1},
        "tensorboard": {"enabled": True, "output_path": "IN/board"},
        "csv_monitor": {"enabled": True, "output_path": "IN/csv"},
    },
    "nowhere": {
        "zero_optimization": {"stage": 1},
        "csv_monitor": {"enabled": True, "output_path": "IN/zero1.json/csv"},
    },
    "many": {
        "optimizer": {},
        "fp16": {"enabled": "no"},
        "steps_per_print": 0,
        "zero_optimizatio": 1,
    },
}

# A line, and what is said of it; `IN` is the folder of the files, DATA and RUN what they say.
TABLE: tuple[tuple[str, str], ...] = (
    ("--data-dir DATA", READY),
    ("--data-dir DATA --precision bf16 --activation-checkpointing", READY),
    ("--data-dir DATA --engine fsdp --queue sharded --clip-grad 1", READY),
    ("--data-dir DATA --deepspeed IN/zero0.json", READY),
    ("--data-dir DATA --deepspeed IN/zero1.json --accumulation-steps 2", READY),
    ("--data-dir DATA --deepspeed IN/zero3.json --precision fp16", READY),
    ("--data-dir DATA --deepspeed IN/board.json", READY),
    ("--data-dir DATA --model vit_small --image-size 32", READY),
    ("--data-dir DATA --resume RUN", READY),
    ("--data-dir DATA --cache IN/pixels --knn-freq 1", READY),
    ("--data-dir DATA --deepspeed IN/adam.json", "its 'optimizer' section contradicts --momentum"),
    (
        "--data-dir DATA --deepspeed IN/batch.json",
        "train_batch_size 999 contradicts --batch-size 8",
    ),
    ("--data-dir DATA --deepspeed IN/misspelt.json", "zero_optimisation is unknown; do you mean"),
    ("--data-dir DATA --deepspeed IN/inside.json", "zero_optimization.reduce_bucket_sise 5"),
    (
        "--data-dir DATA --deepspeed IN/bf16.json --precision fp16",
        "bf16 is enabled but --precision",
    ),
    ("--data-dir DATA --deepspeed IN/wandb.json", "wandb needs a package that is not installed"),
    ("--data-dir DATA --deepspeed IN/nowhere.json", "name another place, or remove the section"),
    ("--data-dir DATA --deepspeed IN/moq.json", "quantize_training is not done here"),
    ("--data-dir DATA --deepspeed IN/nvme.json", "offload_optimizer to 'nvme' is not supported"),
    ("--data-dir DATA --deepspeed IN/legacy.json", "DeepSpeed cannot start with this"),
    ("--data-dir DATA --deepspeed IN/zero3.json --compile", "--compile does not go with stage 3"),
    ("--data-dir DATA --deepspeed IN/many.json", "fp16.enabled 'no': must be true, false"),
    ("--data-dir DATA --deepspeed IN/none.json", "No such file"),
    ("--data-dir DATA --model vit_small --image-size 33", "not a multiple of vit_small's patches"),
    ("--data-dir DATA --model vit_small --model-width 2", "for vit_small, choose one of 1"),
    ("--data-dir DATA --accumulation-steps 3", "--accumulation-steps 3 does not divide"),
    ("--data-dir DATA --batch-size 12 --bn-group-size 8", "groups must tile the global batch"),
    ("--data-dir DATA --batch-size 64 --bn-group-size 8", "do not fill one global batch of 64"),
    ("--data-dir DATA --shuffle-bn node --bn-group-size 8", "that is one BatchNorm group"),
    ("--data-dir DATA --decode gpu", "--decode gpu needs a GPU"),
    ("--data-dir DATA --device cuda --output-dir IN/zero1.json", "is a file; name a folder"),
    ("--data-dir DATA --output-dir RUN --nce-k 16", "--nce-k: 32 in the run, 16 now"),
    ("--data-dir DATA --output-dir RUN --resume none", "already holds a run"),
    ("--data-dir DATA --resume IN/nowhere", "nowhere"),
    ("--data-dir IN/none", "IN/none"),
    ("--data-dir DATA --knn-freq 1 --max-steps 0 --epochs 0", "--epochs 0: must be greater than 0"),
    ("--data-dir BROKEN --knn-freq 1", "--knn-freq 0"),
)


def verdict(flags: list[str], act: Callable[[Config], None]) -> tuple[str, str]:
    """What comes of a command line, READY or the message; and all that was said on the way."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            act(parse(flags))
        except UserError as error:
            return str(error), said.getvalue()
    return READY, said.getvalue()


def start(config: Config) -> None:
    """Start a run and stop it before its first step."""
    stopped = mock.patch("moco_scale.training.loop._loop", side_effect=InterruptedError)
    with stopped, contextlib.suppress(InterruptedError):
        train(Run(config))


def look(config: Config) -> None:
    preflight.run(config, Phases())


def tree(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def verdicts(lines: list[str], folder: str) -> list[tuple[str, str, list[str], str]]:
    """Of each line: the start's, preflight's, what preflight left behind, what it said."""
    root, answers = Path(folder), []
    for number, line in enumerate(lines):
        flags = [*TINY, *line.split()]
        if "--output-dir" not in flags:
            flags += ["--output-dir", str(root / f"new{number}" / "out")]
        before = tree(root)
        looked, said = verdict([*flags, "--preflight"], look)
        left = [name for name in tree(root).items() ^ before.items()]
        made = (root / f"new{number}").exists()
        started, _ = verdict(flags, start)
        answers.append((started, looked, [*map(str, left), *(["folder"] if made else [])], said))
    return answers


def test_preflight_and_start_give_the_same_answer(tiny_shards: Path, tmp_path: Path) -> None:
    for name, content in FILES.items():
        text = json.dumps(content).replace("IN/", f"{tmp_path}/")
        (tmp_path / f"{name}.json").write_text(text)
    run, broken = tmp_path / "run", tmp_path / "broken"
    shutil.copytree(tiny_shards, broken)
    for file in broken.rglob("*val*"):
        if file.is_file():
            file.write_bytes(b"")
    write_image(tmp_path / "unused.jpg", seed=1)
    (first,) = run_ranks(begun, 1, str(tiny_shards), str(run))
    assert first == READY

    def real(line: str) -> str:
        names = {"DATA": tiny_shards, "RUN": run, "BROKEN": broken}
        for name, path in names.items():
            line = line.replace(name, str(path))
        return line.replace("IN/", f"{tmp_path}/")

    lines = [real(line) for line, _ in TABLE]
    (answers,) = run_ranks(verdicts, 1, lines, str(tmp_path), timeout=280.0)
    for (line, expected), (started, looked, left, said) in zip(TABLE, answers, strict=True):
        assert looked == started, line
        assert real(expected) in started, f"{line}\n{started}"
        assert (started == READY) == (expected == READY), line
        assert ("ready, after" in said) == (expected == READY), said
        assert not left, line


def begun(data: str, out: str) -> str:
    """Make a run of one step."""
    flags = [*TINY, "--data-dir", data, "--output-dir", out, "--max-steps", "1"]
    return verdict(flags, lambda config: train(Run(config)))[0]
