"""Demo pipeline from images to a table, through the same commands that a user would type.

Shards, pretraining under the ``deepspeed`` launcher, linear and kNN evaluation; each step is a
process of its own and prints its command line.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from moco_scale.config.command_line import config_of, make_parser
from moco_scale.config.flag_types import positive_int
from moco_scale.config.schema import Config
from moco_scale.data.loading.loader import evaluation_loader
from moco_scale.data.open import open_shards
from moco_scale.data.shards.index_file import has_split
from moco_scale.data.shards.protocols import Images
from moco_scale.demo.output_folder import SUMMARY
from moco_scale.distributed.launcher_watch import STARTER
from moco_scale.evaluation.knn import open_splits, unlabelled_split, weighted_knn
from moco_scale.untrusted.documents import read_document
from moco_scale.untrusted.limits import SETTINGS_JSON
from moco_scale.untrusted.metrics import records
from moco_scale.untrusted.results import Accuracy
from moco_scale.utils.errors import StoppedEarly, UserError
from moco_scale.utils.files import write_atomically
from moco_scale.utils.log import tell
from moco_scale.utils.parents import session
from moco_scale.utils.process_pool import core_count
from moco_scale.utils.signals import is_ignored

_OWN_FLAGS = {
    "data_dir": "the shards are made here, from the images",
    "config": "the settings are those of this demo, and flags",
    "preflight": "it trains nothing that could be evaluated",
}
"""Flags of training that a demo cannot hand on, by field, and why."""
_EVALUATION_BATCH = 256
_SAVE_SECONDS = 60.0  # for a step that has been asked to end


@dataclass(frozen=True)
class Training:
    """Command line of training.

    Attributes:
        words: flags, without data and output folder.
        config: their configuration.
    """

    words: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Experiment:
    """Settings of one demo.

    Attributes:
        title: first line of the output.
        source: makes the images, for ``python -m moco_scale shard --source``; not called when there
            are shards already.
        out: folder for all files; made by :mod:`~moco_scale.demo.output_folder`.
        training: see there.
        processes: that train and evaluate.
        shard_flags: further flags of the shard command.
    """

    title: str
    source: Callable[[], Path]
    out: Path
    training: Training
    processes: int
    shard_flags: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser, output_dir: str, before: str) -> None:
    """Add the flags that all demos have.

    Args:
        parser: of the demo.
        output_dir: default output folder.
        before: describes, for the help, what happens to an earlier run in the folder.
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
        type=positive_int,
        metavar="N",
        help="training processes (default: the GPUs there are, or 2 on a CPU)",
    )
    parser.epilog = (
        f"Every flag of training can be given as well ({parser.prog.rpartition(' ')[0]} train "
        "--help) and goes before the settings of this run."
    )


def training(prog: str, settings: Mapping[str, str], passthrough: Sequence[str]) -> Training:
    """Build the command line of training and read it as training will.

    Args:
        prog: the running command, for argparse's messages.
        settings: this demo's flags of training by name, and their values.
        passthrough: flags that the user has added.

    Raises:
        UserError: Values contradict each other, or a flag is the demo's own.
        SystemExit: A flag is unknown to training; it has been named.
    """
    parser = make_parser()
    parser.prog, parser.usage = prog, f"{prog} [flags of its own, see --help] [flags of train]"
    given = vars(parser.parse_args(passthrough))
    for name, why in _OWN_FLAGS.items():
        if given[name] is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for train alone and not passed on: {why}"
            )
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    if given["deepspeed"] is None and given["engine"] is None:
        words = ["--deepspeed", "zero1", *words]
    words += passthrough
    return Training(tuple(words), config_of(vars(parser.parse_args(words))))


def run(experiment: Experiment, *, started: float) -> None:
    """Shard, pretrain, evaluate; print the table and write ``summary.json``.

    Args:
        experiment: to run.
        started: time.monotonic() when the demo began, for ``seconds``.

    Raises:
        UserError: A step fails.
    """
    out = experiment.out.resolve()
    shards = out / "shards"
    training, config = experiment.training, experiment.training.config
    launch = _launcher(experiment.processes)
    environment = _environment(experiment.processes)

    def step(name: str, program: Sequence[str], **flags: object) -> None:
        command = [*program]
        for flag, value in flags.items():
            command += [f"--{flag.replace('_', '-')}", *([] if value is True else [str(value)])]
        run_step(name, command, environment)

    if not has_split(shards, "train"):  # else an interrupted run has made them
        shutil.rmtree(shards, ignore_errors=True)
        shard = [sys.executable, "-m", "moco_scale", "shard", *experiment.shard_flags]
        step("Sharding", shard, source=experiment.source().resolve(), out=shards)
    if not has_split(shards, "val"):
        raise UserError("the source has no val/ images to evaluate on")
    splits = open_splits(shards)
    unlabelled = unlabelled_split(splits)
    if unlabelled is not None:
        raise UserError(
            f"the {unlabelled.split} images have no labels to evaluate with; "
            "a source has folders train/CLASS/* and val/CLASS/*"
        )
    train = [*launch, "train", *training.words]
    step("Pretraining", train, data_dir=shards, output_dir=out)
    evaluate = [*launch, "evaluate"]
    shared: dict[str, object] = {
        "data_dir": shards,
        "pretrained_model": out / "current.pth",
        "batch_size": evaluation_batch(len(splits.train), experiment.processes),
    }
    if config.run.device != "auto":
        shared["device"] = config.run.device
    if config.run.bad_samples == "skip":
        shared["bad_samples"] = "skip"
    # The monitor's kNN before training looks at the projected output: so does the one after it.
    # On cached features of so few images the learning rate of ImageNet, 30, is far too high.
    for protocol, more in (
        ("linear", {"cache_features": True, "lr": 3, "epochs": 30}),
        ("knn", {"features": "projection"}),
    ):
        folder = out / f"eval-{protocol}"
        flags = {**shared, "output_dir": folder, "protocol": protocol, **more}
        if not (folder / "results.json").exists():
            step(f"Evaluating, {protocol}", evaluate, **flags)
    size, ratio = config.data.image_size, config.preset.resize_ratio
    measured: dict[str, float | None] = {
        "knn_pixels": knn_on_pixels(shards, size, ratio),
        "knn_initial": initial_knn(out / "metrics.jsonl"),
        "knn_pretrained": _result(out / "eval-knn"),
        "linear": _result(out / "eval-linear"),
    }
    summary = {
        name: value if value is None else round(value, 2) for name, value in measured.items()
    }
    summary["seconds"] = round(time.monotonic() - started, 1)
    write_atomically(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    _print_table(experiment, summary)


def evaluation_batch(images: int, processes: int) -> int:
    """Return the usual global batch, or the largest smaller one that images fill.

    Processes must be able to share it.
    """
    batch = min(_EVALUATION_BATCH, images) // processes * processes
    if not batch:
        raise UserError(f"{images} training images are too few for {processes} processes")
    return batch


def knn_on_pixels(shards: Path, image_size: int, resize_ratio: float) -> float:
    """Measure top-1 in percent of weighted kNN on mean-subtracted, L2-normalised pixels."""
    (bank, bank_labels), (queries, labels) = (
        _pixels(open_shards(shards, split), image_size, resize_ratio) for split in ("train", "val")
    )
    mean = bank.mean(dim=0)
    bank, queries = (torch.nn.functional.normalize(x - mean, dim=1) for x in (bank, queries))
    classes = int(max(bank_labels.max(), labels.max())) + 1
    k = min(200, len(bank))
    return float(weighted_knn(bank, bank_labels, queries, labels, classes, k=k)["top1"])


def _pixels(
    shards: Images, image_size: int, resize_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load all images of a split in order: float32 [N, 3 * S * S] in 0..1, and int64 labels [N]."""
    loader = evaluation_loader(shards, image_size, resize_ratio, batch_size=256, num_workers=0)
    batches = [(batch.views[0].flatten(1), batch.labels) for batch in loader]
    pixels = torch.cat([pixels for pixels, _ in batches]).float() / 255
    return pixels, torch.cat([labels for _, labels in batches])


def process_count(wanted: int | None, batch_size: int) -> int:
    """Return the wanted number, else the number of GPUs, or 2 on a CPU, that divides the batch.

    Raises:
        UserError: The wanted number does not divide the batch.
    """
    if wanted is not None:
        if batch_size % wanted:
            raise UserError(
                f"--num-processes {wanted} does not divide --batch-size {batch_size}: every "
                "process takes an equal part of it"
            )
        return wanted
    available = torch.cuda.device_count() or 2
    return next(n for n in range(available, 0, -1) if batch_size % n == 0)


def _launcher(processes: int) -> list[str]:
    """Return the command of this Python's deepspeed and package, on a free port."""
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner"]  # what `deepspeed` runs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shape = ["--num_gpus", str(processes), "--master_port", str(port)]
    return [*deepspeed, *shape, "--module", "moco_scale"]


def _environment(processes: int) -> dict[str, str]:
    """Return the caller's variables, with this environment's programs first and cores shared."""
    threads = max(1, core_count() // processes) if not torch.cuda.device_count() else 1
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PATH": path}


def run_step(name: str, command: list[str], environment: dict[str, str]) -> None:
    """Run one command and raise UserError if it fails."""
    line = shlex.join(command)
    tell(f"\n== {name}\n$ {line}")
    started = time.monotonic()
    status = _status_of(command, environment | {STARTER: str(os.getpid())}, name.lower())
    if status:
        raise UserError(
            f"{name.lower()} failed with exit status {status}; what went wrong is above. "
            f"The command was: {line}"
        )
    tell(f"   {name.lower()} took {time.monotonic() - started:.0f} s")


def _status_of(command: list[str], environment: dict[str, str], doing: str) -> int:
    """Run a command in its own session, which ends orderly with this process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedEarly(f"{signal.Signals(number).name}: stopped while {doing}")

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if not is_ignored(n)]
    before = {number: signal.signal(number, stop) for number in numbers}
    # Of its own: deepspeed's launcher would answer Ctrl-C by killing what is about to save.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait()
    except (KeyboardInterrupt, StoppedEarly):
        os.killpg(process.pid, signal.SIGTERM)
        tell(f"   waiting for {doing} to save and end")
        deadline = time.monotonic() + _SAVE_SECONDS
        while session(process.pid) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.1)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def initial_knn(metrics: Path) -> float | None:
    """Return the kNN top-1 that training logged for the initial encoder; None without one."""
    with contextlib.suppress(OSError):  # training continues without it
        for record in records(metrics):
            value = record.get("knn_top1_initial")
            if isinstance(value, int | float):
                return float(value)
    return None


def _result(folder: Path) -> float:
    return read_document(folder / "results.json", Accuracy, SETTINGS_JSON, "the result").top1


def _print_table(experiment: Experiment, summary: dict[str, Any]) -> None:
    rows = (
        ("kNN on pixels", "knn_pixels"),
        ("kNN, network as initialised", "knn_initial"),
        ("kNN, after pretraining", "knn_pretrained"),
        ("linear classifier, centre crops", "linear"),
    )
    width = max(len(label) for label, _ in rows)
    tell(f"\n{experiment.title}: top-1 on held-out images")
    tell("-" * (width + 9))
    for label, key in rows:
        value = summary[key]
        tell(f"{label:<{width}}  " + (f"{value:5.1f} %" if value is not None else "  n/a"))
    tell("-" * (width + 9))
    tell(f"{summary['seconds']:.0f} s in all. To look at:")
    for name, what in (
        ("report.png", "loss and kNN curves"),
        ("neighbours.png", "nearest neighbours before and after training"),
        (SUMMARY, "this table"),
    ):
        path = experiment.out / name
        if path.exists():
            tell(f"  {path}  {what}")
    tell(f"  tensorboard --logdir {experiment.out}")
