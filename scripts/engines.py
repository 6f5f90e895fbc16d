"""Every engine in every precision against DDP in fp32 on one process, and every handover.

``make engines`` prints two tables. The network is small (a stem and two residual blocks), because
CPUs emulate half floats; everything else is a whole run: reader, augmentation, ShuffleBN, queue,
engine, checkpoint. With ``--device cuda`` every process needs a GPU of its own.

The last line is one JSON object: ``cells``, runs compared, and ``wrong``, those beyond a bound.

The first table is after 20 steps. Its errors are relative: the largest of the 20 losses, and the
distance of all weights of the query encoder, of the key encoder, and of the queue from the
reference's, over the reference's length. Bounds:

- fp32: 1e-4. Sums are taken in another order, nothing else differs.
- bf16 and fp16: a unit in the last place is u = 2^-8 or 2^-11. A feature passes L = 8 layers, whose
  roundings add like a random walk to e = u sqrt(L), and a logit divides it by T: losses and
  features agree to e / T. A gradient differs by more: a share e of the activations is close enough
  to zero to fall on the other side of a ReLU, where the whole gradient of that element comes or
  goes, which changes a gradient by sqrt(e) of its length. How far the weights moved therefore
  agrees to sqrt(e), and the weights themselves to that times the share of them that moved.

The second table is of checkpoints: each kind of run is stopped in the middle of an epoch and
resumed by each of the others. Its numbers are the largest relative errors of the remaining losses,
against the run that was not stopped: 0 on the diagonal, and otherwise at most the bound of the
loss above. Position in the data, queue pointer and loss scale must be equal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from moco_scale.checkpoints import checkpoint
from moco_scale.config import command_line, schema
from moco_scale.demo.render import write_folder
from moco_scale.distributed.spawn import run_ranks
from moco_scale.models.batchnorm import GroupedBatchNorm2d
from moco_scale.models.encoder import Encoder
from moco_scale.training import loop
from moco_scale.training.run import Run

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
PRECISIONS = ("fp32", "bf16", "fp16")
COLUMNS = ("loss", "query", "key", "queue")
HANDOVERS = (("ddp", 1), ("zero1", 2), ("zero3", 4), ("fsdp", 2))
STEPS, STOP, END = 20, 8, 12  # an epoch has 5
TEMPERATURE, LAYERS = 0.2, 8
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
FLAGS = (
    *("--recipe", "v2", "--dataset", "images", "--image-size", "24", "--batch-size", "16"),
    *("--bn-group-size", "4", "--nce-k", "96", "--nce-t", str(TEMPERATURE), "--epochs", "10"),
    *("--base-lr", "0.5", "--alpha", "0.9", "--num-workers", "0", "--knn-freq", "0"),
    *("--print-freq", "1", "--aug", "null", "--dim", "16"),
)


def small_encoder(settings: schema.Config) -> Encoder:
    """A network that takes milliseconds, also in emulated half floats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.optim.rng_seed)
        stem = (nn.Conv2d(3, 16, 3, stride=2, bias=False), GroupedBatchNorm2d(16), nn.ReLU())
        blocks = [BasicBlock(16, 16, norm_layer=GroupedBatchNorm2d) for _ in range(2)]
        backbone = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Encoder(backbone, nn.Linear(16, settings.model.dim), 16)


class SmallRun(Run):
    """A whole run of the small network."""

    def initial_encoder(self) -> Encoder:
        return small_encoder(self.config)


def train(arguments: list[str], log: str) -> None:
    """A whole run on this rank, which writes what it has to say into a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    loop.train(SmallRun(command_line.parse(arguments)))


def run(
    engine: str,
    precision: str,
    world: int,
    shards: Path,
    out: Path,
    steps: int = STEPS,
    resume: Path | None = None,
    device: str = "cpu",
    more: Sequence[str] = (),
) -> dict[str, Tensor]:
    """One whole run: its losses, and the tensors of its last checkpoint."""
    flags = [*FLAGS, "--precision", precision, "--data-dir", str(shards), "--output-dir", str(out)]
    flags += ["--device", device, "--max-steps", str(steps), *more]
    if resume is not None:
        flags += ["--resume", str(resume)]
    if engine.startswith("zero"):
        flags += ["--deepspeed", str(ROOT / "ds_configs" / f"{engine}.json")]
    else:
        flags += ["--engine", engine]
    log = f"{out}.log"
    try:
        run_ranks(train, world, flags, log, device=device)
    except SystemExit:
        said = Path(log).read_text()
        raise SystemExit(f"{engine} {precision} on {world} ranks failed:\n{said}") from None
    lines = (out / "metrics.jsonl").read_text().splitlines()
    losses = torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)
    saved = checkpoint.load(out / "checkpoints" / f"step-{steps:08d}")
    return {"losses": losses, **saved}


def together(saved: dict[str, Tensor], prefix: str) -> Tensor:
    """All trained numbers of a part in one vector, fp64."""
    names = [n for n in sorted(saved) if n.startswith(prefix) and "running" not in n]
    return torch.cat([saved[n].double().flatten() for n in names if saved[n].is_floating_point()])


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    result = {"loss": float(((got["losses"] - wanted["losses"]) / wanted["losses"]).abs().max())}
    for name, prefix in (("query", "model.query."), ("key", "model.key."), ("queue", "queue.keys")):
        mine, theirs = together(got, prefix), together(wanted, prefix)
        result[name] = float((mine - theirs).norm() / theirs.norm())
    return result


def loss_bound(precision: str) -> float:
    """Bound the error of a loss, or a feature; see the top of this file."""
    return 1e-4 if precision == "fp32" else UNIT[precision] * math.sqrt(LAYERS) / TEMPERATURE


def movement_bound(precision: str) -> float:
    """Bound the relative error of the weights' movement in half precision."""
    return math.sqrt(UNIT[precision] * math.sqrt(LAYERS))


def bounds(precision: str, wanted: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, float]:
    """Bound each column of the first table; see the top of this file."""
    if precision == "fp32":
        return dict.fromkeys(COLUMNS, 1e-4)
    result = dict.fromkeys(("loss", "queue"), loss_bound(precision))
    for name in ("query", "key"):
        last, first = (together(s, f"model.{name}.") for s in (wanted, start))
        moved = float((last - first).norm() / last.norm())
        result[name] = movement_bound(precision) * moved
    return result


def compare_engines(
    root: Path,
    worlds: list[int],
    engines: list[str],
    precisions: list[str],
    device: str,
    bn_group_size: int,
    shard_size: int,
) -> tuple[int, int]:
    """Print the first table; how many cells it has, and how many are off."""
    shards, groups = root / "shards", ["--bn-group-size", str(bn_group_size)]
    wanted = run("ddp", "fp32", 1, shards, root / "reference", device=device, more=groups)
    encoder = small_encoder(command_line.parse(list(FLAGS)))
    state = {n: t.detach() for n, t in encoder.state_dict().items()}
    start = {f"model.{e}.{n}": t for e in ("query", "key") for n, t in state.items()}
    print(f"relative errors after {STEPS} steps, each with its bound; reference: ddp, fp32, 1 rank")
    print(f"{'engine':8}{'precision':11}{'ranks':7}" + "".join(f"{c:22}" for c in COLUMNS))
    cells_made = failed = 0
    for precision in precisions:
        limit = bounds(precision, wanted, start)
        for engine in engines:
            for world in worlds:
                out = root / f"{engine}-{precision}-{world}"
                more = [*groups]
                if engine == "fsdp" and shard_size:
                    more += ["--fsdp-shard-size", str(shard_size)]
                got = run(engine, precision, world, shards, out, device=device, more=more)
                found = errors(got, wanted)
                good = all(found[c] <= limit[c] for c in COLUMNS)
                cells_made, failed = cells_made + 1, failed + (not good)
                cells = "".join(f"{f'{found[c]:.1e} <= {limit[c]:.1e}':22}" for c in COLUMNS)
                mark = "" if good else "TOO LARGE"
                print(f"{engine:8}{precision:11}{world:<7}{cells}{mark}", flush=True)
    return cells_made, failed


def compare_handovers(root: Path, precision: str, most: int, device: str) -> tuple[int, int]:
    """Print the second table for one precision; how many cells it has, and how many are off.

    most: processes that there can be; a run that has more elsewhere has so many.
    """
    handovers = [(engine, min(world, most)) for engine, world in HANDOVERS]
    limit = loss_bound(precision)
    print(f"\n{precision}: written after step {STOP} by the row, resumed by the column to {END};")
    print(
        f"largest relative error of the losses since; elsewhere than on the diagonal <= {limit:.1e}"
    )
    names = [f"{engine} on {world}" for engine, world in handovers]
    print(f"{'':12}" + "".join(f"{name:14}" for name in names))
    failed, shards = 0, root / "shards"
    for name, (engine, world) in zip(names, handovers, strict=True):
        out = root / f"{precision}-{name}"
        whole = run(engine, precision, world, shards, out, END, device=device)
        first = root / f"{precision}-{name}-stopped"
        run(engine, precision, world, shards, first, STOP, device=device)
        cells = ""
        for other, (engine2, world2) in zip(names, handovers, strict=True):
            out = root / f"{precision}-{name}-{other}"
            start = first / "checkpoints" / f"step-{STOP:08d}"
            got = run(engine2, precision, world2, shards, out, END, start, device)
            rest = whole["losses"][STOP:]
            error = float(((got["losses"] - rest) / rest).abs().max())
            exact = ("queue.pointer", "queue.enqueued", "loss_scale.state")
            good = all(torch.equal(got[n], whole[n]) for n in exact if n in whole)
            good &= error <= (0.0 if other == name else limit)
            failed += not good
            cells += f"{f'{error:.1e}' + ('' if good else ' WRONG'):14}"
        print(f"{name:12}{cells}", flush=True)
    return len(handovers) ** 2, failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Engines, precisions and handovers.")
    parser.add_argument("--worlds", type=int, nargs="*", default=[2, 4], help="processes")
    parser.add_argument(
        "--handovers", nargs="*", default=["fp32", "fp16"], help="precisions of the second table"
    )
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--bn-group-size", type=int, default=4, help="of the first table, of 16 images a step"
    )
    parser.add_argument(
        "--shard-size", type=int, default=0, help="FSDP's --fsdp-shard-size in the first table"
    )
    args = parser.parse_args()
    most = torch.cuda.device_count() if args.device == "cuda" else max(w for _, w in HANDOVERS)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folder(root / "images", train_per_class=8, val_per_class=1, size=48)
        shard = [sys.executable, "-m", "moco_scale", "shard", "--source", str(root / "images")]
        subprocess.run(
            [*shard, "--out", str(root / "shards")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        if args.worlds:
            table = compare_engines(
                root,
                args.worlds,
                args.engines,
                args.precisions,
                args.device,
                args.bn_group_size,
                args.shard_size,
            )
            results.append(table)
        for precision in args.handovers:
            results.append(compare_handovers(root, precision, most, args.device))
    failed = sum(wrong for _, wrong in results)
    print(json.dumps({"cells": sum(cells for cells, _ in results), "wrong": failed}))
    if failed:
        raise SystemExit(f"{failed} cells are off by more than rounding explains")


if __name__ == "__main__":
    main()
