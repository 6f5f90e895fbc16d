"""A complete run on CIFAR-10: shards, pretraining by its recipe, evaluation.

The images come from a folder or tar of theirs, from the official Python archive, or from
torchvision's download of it.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from moco_scale.config.flag_types import positive_int
from moco_scale.data.shards.recognise import first_members
from moco_scale.demo import output_folder, pipeline
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import tell
from moco_scale.utils.progress import progress

SETTINGS = {"recipe": "cifar10", "dataset": "cifar10"}
HELP = (
    "the official cifar-10-python.tar.gz, the folder that holds it or what it unpacks to, or a "
    "folder or tar of images train/CLASS/* and val/CLASS/*"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pipeline.add_arguments(
        parser, "runs/cifar10", "the same command goes on with a run that was interrupted"
    )
    parser.add_argument(
        "--source", type=Path, metavar="SRC", help=f"{HELP} (default: torchvision's download)"
    )
    parser.add_argument(
        "--download-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where a download is kept (default: %(default)s)",
    )
    parser.add_argument(
        "--train-per-class",
        type=positive_int,
        metavar="N",
        help="only the first N training images of each class, by name",
    )


def run(args: argparse.Namespace) -> None:
    """Fetch, shard, pretrain, evaluate, and print a table. Raises UserError."""
    started = time.monotonic()
    if args.source is not None and not args.source.exists():
        raise UserError(f"There is no source {args.source}. --source takes {HELP}")
    training = pipeline.training(args.prog, SETTINGS, args.passthrough)
    processes = pipeline.process_count(args.num_processes, training.config.optim.batch_size)
    shard_flags: tuple[str, ...] = ()
    if args.train_per_class is not None:
        shard_flags = ("--per-class", str(args.train_per_class))
    images = {
        "source": None if args.source is None else str(args.source.resolve()),
        "train_per_class": args.train_per_class,
    }
    if output_folder.claim_or_continue(args.output_dir, images, training.config.defining()):
        tell(f"== Going on with the run in {args.output_dir}")
    experiment = pipeline.Experiment(
        title="CIFAR-10",
        source=lambda: prepare(args.source, args.output_dir, args.download_dir),
        out=args.output_dir,
        training=training,
        processes=processes,
        shard_flags=shard_flags,
    )
    pipeline.run(experiment, started=started)


def prepare(source: Path | None, out: Path, download_dir: Path) -> Path:
    """A source for the shard command: the one given, or images written from the archive.

    Raises:
        UserError: the archive cannot be fetched, is damaged, or is another file than the official
            one (it is unpickled, so nothing else is opened).
    """
    if source is None:
        root = _download(download_dir)
    elif source.is_file() and _is_official(source):
        root = _extract(source, out)
    elif (source / f"{CIFAR10.base_folder}").is_dir():
        root = source
    elif source.name == CIFAR10.base_folder:
        root = source.resolve().parent
    elif (source / CIFAR10.filename).is_file():
        root = _extract(source / CIFAR10.filename, out)
    else:
        return source
    images = out / "images"
    shutil.rmtree(images, ignore_errors=True)  # of an interrupted run
    for split, train in (("train", True), ("val", False)):
        try:
            dataset = CIFAR10(str(root), train=train)
        except RuntimeError:
            raise UserError(
                f"{root / CIFAR10.base_folder} is incomplete or not the official CIFAR-10 "
                f"(checksums differ); unpack {CIFAR10.filename} again"
            ) from None
        write_images(images / split, dataset.data, dataset.targets, dataset.classes)
    return images


def write_images(
    folder: Path, images: np.ndarray, labels: Sequence[int], names: Sequence[str]
) -> None:
    """Write uint8 images [N, H, W, 3] as ``folder/CLASS/00000.png``, numbered in their order."""
    for name in names:
        (folder / name).mkdir(parents=True)
    rows = progress(
        zip(images, labels, strict=True), f"writing {folder.name}", len(images), "images"
    )
    for number, (image, label) in enumerate(rows):
        Image.fromarray(image).save(folder / names[label] / f"{number:05d}.png")


def _is_official(source: Path) -> bool:
    """Whether a file is a tar that begins as the official archive does."""
    first = first_members(source, 1)  # [] of none: the shard command says what is wrong with it
    return bool(first) and first[0].name.split("/")[0] == CIFAR10.base_folder


def _extract(archive: Path, out: Path) -> Path:
    if not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise UserError(
            f"{archive} is not the official CIFAR-10 archive, or damaged: its MD5 is not "
            f"{CIFAR10.tgz_md5}"
        )
    extract_archive(str(archive), str(out / "official"))
    return out / "official"


def _download(folder: Path) -> Path:
    try:
        CIFAR10(str(folder), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 could not be downloaded to {folder} ({error}). Name a copy: "
            f"make cifar10 SOURCE=..., or --source: {HELP}"
        ) from None
    return folder
