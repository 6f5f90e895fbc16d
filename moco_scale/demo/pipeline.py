"""Pictures to a table, through the same commands that a user would type.

Shards, pretraining under the ``deepspeed`` launcher, linear and kNN evaluation; each step is a
process of its own and prints its command line.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moco_scale
from moco_scale.data.open_shards import has_split, open_shards
from moco_scale.data.reader import evaluation_loader
from moco_scale.data.shard_set import Pictures
from moco_scale.errors import UserError
from moco_scale.evaluation.knn import weighted_knn

MARKER = ".moco_scale-demo"
"""The file that says: this folder was made by a demo."""
REPLACEABLE = "Made by a moco_scale demo; the next one may delete it.\n"
SUMMARY = "summary.json"

TRAIN_FLAGS = (
    *("epochs", "batch-size", "base-lr", "weight-decay", "alpha", "nce-k", "nce-t", "model"),
    *("aug", "crop", "image-size", "bn-group-size", "precision", "num-workers", "knn-freq"),
    *("print-freq", "rng-seed", "max-steps"),
)
"""Flags of train.py that a demo hands on as they are; train.py checks the values."""


@dataclass(frozen=True)
class Experiment:
    """What one demo runs.

    Attributes:
        title: first line of what is printed.
        source: gets the pictures ready, as ``python -m moco_scale shard --source`` takes them;
            not called when there are shards already.
        out: folder for everything that is written; made by :func:`claim`.
        shard_flags: further flags of the shard command.
        train_flags: flags of train.py by name.
        batch_size: global batch that those flags mean; the processes must divide it.
        image_size: side of the pictures that the kNN on pixels compares.
        resize_ratio: evaluation resizes the short side to this times image_size.
    """

    title: str
    source: Callable[[], Path]
    out: Path
    train_flags: dict[str, str]
    batch_size: int
    image_size: int
    resize_ratio: float = 1.0
    shard_flags: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser, output_dir: str, before: str) -> None:
    """The flags that all demos have.

    before: what happens to an earlier run in the folder, for the help.
    """
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(output_dir),
        metavar="OUT",
        help=f"folder for everything that is written; {before} (default: %(default)s)",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        default=0,
        metavar="N",
        help="training processes (default: the GPUs there are, or 2 on a CPU)",
    )
    group = parser.add_argument_group("handed on to train.py (see python train.py --help)")
    for name in TRAIN_FLAGS:
        group.add_argument(f"--{name}", metavar="VALUE")


def given_flags(args: argparse.Namespace) -> dict[str, str]:
    """The flags of train.py that were given, by name without dashes in front."""
    values = {name: getattr(args, name.replace("-", "_")) for name in TRAIN_FLAGS}
    return {name: value for name, value in values.items() if value is not None}


def claim(out: Path) -> None:
    """Make `out` an empty folder marked as a demo's; what an earlier demo left there is deleted.

    Raises:
        UserError: it holds anything else, or cannot be written.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            marker = out / MARKER
            if not (marker.is_file() and marker.read_text(encoding="utf-8") == REPLACEABLE):
                raise UserError(
                    f"--output-dir {out} holds files that no demo made; "
                    "name another folder, or move them away"
                )
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text(REPLACEABLE, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output-dir {out} cannot be written: {error.strerror}") from None


def claim_or_continue(out: Path, settings: dict[str, Any]) -> bool:
    """Make `out` this run's folder, or keep what an interrupted run of the same settings left.

    Returns:
        Whether there is something to go on with.

    Raises:
        UserError: it holds another run, a finished one, or anything else, or cannot be written.
    """
    text = json.dumps(settings, indent=1, sort_keys=True, default=str) + "\n"
    marker = out / MARKER
    try:
        if not out.is_dir() or not any(out.iterdir()):
            out.mkdir(parents=True, exist_ok=True)
            marker.write_text(text, encoding="utf-8")
            return False
        same = marker.is_file() and marker.read_text(encoding="utf-8") == text
    except OSError as error:
        raise UserError(f"--output-dir {out} cannot be written: {error.strerror}") from None
    if not same or (out / SUMMARY).exists():
        holds = "a finished run" if same else "something else, or a run with other flags"
        raise UserError(
            f"--output-dir {out} holds {holds}; name another folder, or move that one away"
        )
    return True


def run(experiment: Experiment, *, processes: int = 0, started: float | None = None) -> None:
    """Shard, pretrain, evaluate; print the table and write ``summary.json``.

    started: time.monotonic() when the demo began, for ``seconds``; default: now.

    Raises:
        UserError: a step fails.
    """
    started = time.monotonic() if started is None else started
    out = experiment.out.resolve()
    shards = out / "shards"
    root = _checkout()
    processes = processes or process_count(experiment.batch_size)
    launch = _launcher(processes)
    environment = _environment(processes)

    def step(name: str, program: Sequence[str], **flags: object) -> None:
        command = [*program]
        for flag, value in flags.items():
            command += [f"--{flag.replace('_', '-')}", *([] if value is True else [str(value)])]
        run_step(name, command, root, environment)

    if not has_split(shards, "train"):  # else an interrupted run has made them
        shutil.rmtree(shards, ignore_errors=True)
        shard = [sys.executable, "-m", "moco_scale", "shard", *experiment.shard_flags]
        step("Sharding", shard, source=experiment.source().resolve(), out=shards)
    if not has_split(shards, "val"):
        raise UserError("the source has no val/ pictures to evaluate on")
    train = [*launch, "train.py", "--deepspeed", "ds_configs/zero1.json"]
    step("Pretraining", train, data_dir=shards, output_dir=out, **experiment.train_flags)
    evaluate = [*launch, "eval.py"]
    shared: dict[str, object] = {"data_dir": shards, "pretrained_model": out / "current.pth"}
    # The monitor's kNN before training looks at the projected output: so does the one after it.
    # On cached features of so few pictures the learning rate of ImageNet, 30, is far too high.
    for protocol, more in (
        ("linear", {"cache_features": True, "lr": 3, "epochs": 30}),
        ("knn", {"features": "projection"}),
    ):
        folder = out / f"eval-{protocol}"
        flags = {**shared, "output_dir": folder, "protocol": protocol, **more}
        if not (folder / "results.json").exists():
            step(f"Evaluating, {protocol}", evaluate, **flags)
    summary: dict[str, Any] = {
        "knn_pixels": knn_on_pixels(shards, experiment.image_size, experiment.resize_ratio),
        "knn_initial": initial_knn(out / "metrics.jsonl"),
        "knn_pretrained": _result(out / "eval-knn"),
        "linear": _result(out / "eval-linear"),
    }
    summary = {name: round(value, 2) for name, value in summary.items()}
    summary["seconds"] = round(time.monotonic() - started, 1)
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print_table(experiment, summary)


def knn_on_pixels(shards: Path, image_size: int, resize_ratio: float) -> float:
    """Top-1 in percent of the weighted kNN on mean-subtracted, L2-normalised pixels."""
    (bank, bank_labels), (queries, labels) = (
        _pixels(open_shards(shards, split), image_size, resize_ratio) for split in ("train", "val")
    )
    mean = bank.mean(dim=0)
    bank, queries = (torch.nn.functional.normalize(x - mean, dim=1) for x in (bank, queries))
    classes = int(max(bank_labels.max(), labels.max())) + 1
    k = min(200, len(bank))
    return float(weighted_knn(bank, bank_labels, queries, labels, classes, k=k)["top1"])


def _pixels(
    shards: Pictures, image_size: int, resize_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures of a split in order: float32 [N, 3 * S * S] in 0..1, and int64 labels [N]."""
    loader = evaluation_loader(shards, image_size, resize_ratio, batch_size=256, num_workers=0)
    batches = [(batch.views[0].flatten(1), batch.labels) for batch in loader]
    pixels = torch.cat([pixels for pixels, _ in batches]).float() / 255
    return pixels, torch.cat([labels for _, labels in batches])


def _checkout() -> Path:
    """The folder of train.py, eval.py and ds_configs."""
    root = Path(moco_scale.__file__).resolve().parent.parent
    missing = [n for n in ("train.py", "eval.py", "ds_configs") if not (root / n).exists()]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not in {root}. The demos start the scripts of a checkout: "
            "clone the repository and run `make setup` in it"
        )
    return root


def process_count(batch_size: int) -> int:
    """The GPUs there are, or 2 on a CPU; as many of them as divide the batch."""
    available = torch.cuda.device_count() or 2
    return next(n for n in range(available, 0, -1) if batch_size % n == 0)


def core_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _launcher(processes: int) -> list[str]:
    """The deepspeed of this environment, on a port that nobody uses."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    if not deepspeed.exists():
        raise UserError(f"{deepspeed} is missing: run `make setup`, and the demo with its Python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [str(deepspeed), "--num_gpus", str(processes), "--master_port", str(port)]


def _environment(processes: int) -> dict[str, str]:
    """The caller's, with this environment's programs first and the cores shared out."""
    threads = max(1, core_count() // processes) if not torch.cuda.device_count() else 1
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PATH": path}


def run_step(name: str, command: list[str], root: Path, environment: dict[str, str]) -> None:
    line = shlex.join(command)
    print(f"\n== {name}\n$ {line}", flush=True)
    started = time.monotonic()
    status = subprocess.run(command, cwd=root, env=environment, check=False).returncode
    if status:
        raise UserError(
            f"{name.lower()} failed with exit status {status}; what went wrong is above. "
            f"The command was: {line}"
        )
    print(f"   {name.lower()} took {time.monotonic() - started:.0f} s", flush=True)


def initial_knn(metrics: Path) -> float:
    """The kNN top-1 that training logged for the encoder it started from."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "knn_top1_initial" in record:
            return float(record["knn_top1_initial"])
    raise UserError(f"{metrics} has no kNN from before training; leave --knn-freq above 0")


def _result(folder: Path) -> float:
    return float(json.loads((folder / "results.json").read_text(encoding="utf-8"))["top1"])


def _print_table(experiment: Experiment, summary: dict[str, Any]) -> None:
    rows = (
        ("kNN on pixels", "knn_pixels"),
        ("kNN, network as initialised", "knn_initial"),
        ("kNN, after pretraining", "knn_pretrained"),
        ("linear classifier, centre crops", "linear"),
    )
    width = max(len(label) for label, _ in rows)
    print(f"\n{experiment.title}: top-1 on held-out pictures")
    print("-" * (width + 9))
    for label, key in rows:
        print(f"{label:<{width}}  {summary[key]:5.1f} %")
    print("-" * (width + 9))
    print(f"{summary['seconds']:.0f} s in all. To look at:")
    for name, what in (
        ("report.png", "loss and kNN curves"),
        ("neighbours.png", "nearest neighbours before and after training"),
        (SUMMARY, "this table"),
    ):
        path = experiment.out / name
        if path.exists():
            print(f"  {path}  {what}")
    print(f"  tensorboard --logdir {experiment.out}")
