"""Train with two checkouts and compare every number to the bit: that a refactoring changes none.

``python scripts/same_numbers.py A B`` runs the same commands in both, on a CPU: 20 steps under DDP
on 1, 2 and 4 processes, ZeRO-1, ZeRO-3 and FSDP2 on 2, in fp32 and bf16, with plain and symmetric
loss. Compared are the losses and kNN of ``metrics.jsonl`` and every tensor of the last checkpoint
(weights of both encoders, BatchNorm's statistics, momentum, queue). Then B resumes a checkpoint
that A wrote in the middle of an epoch, and has to end where A does that resumes it too.

Each tree is run with this Python, so both need the libraries that are installed here. It takes
some twenty minutes on two cores; ``--only ddp`` runs the cells whose name begins so. The last line
is one JSON object: ``cells``, pairs of runs compared, and ``different``, those not alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

BIN = Path(sys.executable).parent
STEPS, STOP = 20, 13  # of 10 steps an epoch
FLAGS = (
    *("--recipe", "v2", "--dataset", "images", "--model", "resnet18", "--image-size", "24"),
    *("--batch-size", "16", "--bn-group-size", "4", "--nce-k", "96", "--epochs", "4"),
    *("--base-lr", "0.5", "--alpha", "0.9", "--dim", "16", "--print-freq", "1"),
    *("--knn-freq", "1", "--num-workers", "1", "--device", "cpu"),
)
ENGINES = {
    "ddp": ("--engine", "ddp"),
    "zero1": ("--deepspeed", "ds_configs/zero1.json"),
    "zero3": ("--deepspeed", "ds_configs/zero3.json"),
    "fsdp": ("--engine", "fsdp"),
}
LAYOUTS = (("ddp", 1), ("ddp", 2), ("ddp", 4), ("zero1", 2), ("zero3", 2), ("fsdp", 2))


class Cell(NamedTuple):
    """One pair of runs."""

    engine: str
    processes: int
    precision: str
    symmetric: bool

    @property
    def name(self) -> str:
        """Such as ddp2-bf16-symmetric."""
        return f"{self.engine}{self.processes}-{self.precision}" + "-symmetric" * self.symmetric

    def flags(self) -> tuple[str, ...]:
        """Flags of train.py that make it."""
        symmetric = ("--symmetric",) if self.symmetric else ()
        return (*ENGINES[self.engine], "--precision", self.precision, *symmetric)


def cells() -> Iterator[Cell]:
    """Yield all pairs of runs, each kind of launch first in fp32."""
    for symmetric in (False, True):
        for precision in ("fp32", "bf16"):
            for engine, processes in LAYOUTS:
                yield Cell(engine, processes, precision, symmetric)


def make_images(folder: Path) -> None:
    """Write 160 training and 16 validation images of two classes."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 8)):
        for number in range(2 * count):
            path = folder / split / ("ash", "birch")[number % 2] / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = draw.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(path)


def start(tree: Path, command: Sequence[object]) -> None:
    """Run a command in a checkout.

    Raises:
        SystemExit: it fails; what it said is printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(map(str, command))}\n{done.stdout}")


def train(tree: Path, data: Path, out: Path, cell: Cell, steps: int) -> None:
    """Train to a step, or resume to it."""
    torchrun = [BIN / "torchrun", "--standalone", "--nproc_per_node", cell.processes]
    launcher = torchrun if cell.processes > 1 else [sys.executable]
    where = ("--data-dir", data, "--output-dir", out, "--max-steps", steps)
    start(tree, [*launcher, "train.py", *FLAGS, *cell.flags(), *where])


def numbers(out: Path) -> dict[str, Any]:
    """Return losses and kNN by step, and the tensors of the newest checkpoint by name."""
    found: dict[str, Any] = {}
    for line in (out / "metrics.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        for key in ("loss", "knn_top1", "knn_top1_initial"):
            if key in record:
                found[f"{key} of step {record['step']}"] = record[key]
    reader = dcp.FileSystemReader(max((out / "checkpoints").glob("step-*")))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return found | tensors


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Name what is in one alone, or not equal to the bit."""
    wrong = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        alike = torch.equal(x, y) if isinstance(x, Tensor) else x == y
        if not alike:
            wrong.append(name)
    return wrong


def main() -> int:
    """Compare two checkouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("a", type=Path, help="a checkout, such as of the parent commit")
    parser.add_argument("b", type=Path, help="another")
    parser.add_argument("--only", default="", help="beginning of the names of cells")
    args = parser.parse_args()
    a, b = args.a.resolve(), args.b.resolve()
    chosen = [cell for cell in cells() if cell.name.startswith(args.only)]
    wrong: list[str] = []

    def compare(name: str, x: Path, y: Path) -> None:
        found = numbers(x)
        names = differences(found, numbers(y))
        if names:
            wrong.append(name)
        said = f"DIFFERENT in {len(names)}: {', '.join(names[:4])}" if names else "equal"
        print(f"{name:<28}{len(found):>5} numbers and tensors  {said}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images")
        for label, tree in (("a", a), ("b", b)):
            shards = ("shard", "--source", root / "images", "--out", root / label / "data")
            start(tree, [sys.executable, "-m", "moco_scale", *shards])
        for cell in chosen:
            for label, tree in (("a", a), ("b", b)):
                train(tree, root / label / "data", root / label / cell.name, cell, STEPS)
            compare(cell.name, root / "a" / cell.name, root / "b" / cell.name)
        for cell in (cell for cell in chosen if not cell.symmetric and cell.precision == "fp32"):
            # Both resume: one save more moves BatchNorm's means over ranks by a rounding.
            stopped, handed = root / "stopped" / cell.name, root / "handed" / cell.name
            train(a, root / "a/data", stopped, cell, STOP)
            shutil.copytree(stopped, handed)
            train(a, root / "a/data", stopped, cell, STEPS)
            train(b, root / "a/data", handed, cell, STEPS)
            compare(f"{cell.name}, resumed", stopped, handed)
    print(json.dumps({"cells": len(chosen), "different": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
