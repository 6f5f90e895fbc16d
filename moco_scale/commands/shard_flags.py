"""The options of ``shard``, and its command line, which is made from them."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from moco_scale.config import options
from moco_scale.config.flag_types import named_path, whole_number
from moco_scale.config.options import POSITIVE, Range, option
from moco_scale.data.remote.shard_source import CACHE_GB
from moco_scale.data.tools.ilsvrc import ACCEPTED, DEVKIT_TAR, TRAIN_TAR, VAL_TAR
from moco_scale.data.tools.output_folder import LEFT_OUT
from moco_scale.data.tools.writer import ShardSize
from moco_scale.utils.process_pool import core_count


def _shard_size(text: str) -> ShardSize:
    match = re.fullmatch(r"(\d+)\s*(|k|M|G)(B?)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) < 1 or bool(match[2]) > bool(match[3]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of images nor a size such as 256MB"
        )
    if not match[3]:
        return ShardSize(images=int(match[1]))
    factor = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2].lower()]
    return ShardSize(images=None, bytes=int(match[1]) * factor)


@dataclass(frozen=True)
class SourceConfig:
    """Where the images are."""

    source: Path | None = option(
        None,
        "a folder with train/CLASS/* and perhaps val/CLASS/*, or CLASS/*, or unlabelled "
        "images; a zip or a tar of one (.gz .bz2 .xz: decompressed once next to DIR, which needs "
        "room); "
        f"{TRAIN_TAR}; or the folder that holds {TRAIN_TAR}, {VAL_TAR} and {DEVKIT_TAR}",
        type=named_path,
        metavar="SRC",
    )
    val_source: Path | None = option(
        None,
        f"validation images from elsewhere, e.g. {VAL_TAR}",
        type=named_path,
        metavar="SRC",
    )
    val_ground_truth: Path | None = option(
        None,
        f"the classes of validation images that lie in no class folders. {ACCEPTED}",
        type=named_path,
        metavar="FILE",
    )
    train_only: bool = option(False, "write no validation images", switch=True)
    unlabelled: bool = option(False, "take all images, whatever folder they lie in", switch=True)
    per_class: int | None = option(
        None,
        "only the first N training images of each class, by name",
        type=whole_number,
        metavar="N",
        within=POSITIVE,
    )


@dataclass(frozen=True)
class OutputConfig:
    """The shards that are made."""

    out: Path | None = option(None, "folder to make", type=named_path, metavar="DIR")
    overwrite: bool = option(
        False, "replace the shards in DIR, once the new ones are complete", switch=True
    )
    shard_size: ShardSize = option(
        ShardSize(),
        "images in a shard, or their size in SRC, as in 256MB (default: 1000)",
        type=_shard_size,
        metavar="N",
    )
    short_side: int | None = option(
        None,
        "shrink larger images so that their shorter side has N pixels, and save them as "
        "JPEG; smaller ones keep their bytes",
        type=whole_number,
        metavar="N",
        within=POSITIVE,
    )
    quality: int = option(
        90,
        "JPEG quality with --short-side, 1 to 100",
        metavar="Q",
        within=Range("must lie between 1 and 100", 1, 100),
    )
    verify: bool = option(
        False,
        f"decode every image; leave out and list in DIR/{LEFT_OUT} those that are damaged",
        switch=True,
    )
    seed: int = option(0, "of the random order", metavar="N")
    workers: int = option(
        core_count(),
        f"processes; they do not change the shards (default: the cores there are, {core_count()})",
        metavar="N",
        within=POSITIVE,
    )


@dataclass(frozen=True)
class ExistingConfig:
    """What is done with shards that exist."""

    check: Path | None = option(
        None,
        "read every byte, decode every image, compare with the index; status 1 and a list "
        "when something is damaged",
        type=named_path,
        metavar="DIR",
    )
    repair: Path | None = option(
        None,
        "make the index again from the tars, and damaged tars from what can be read of them; "
        f"what is lost is listed in DIR/{LEFT_OUT}, and what is replaced stays beside it",
        type=named_path,
        metavar="DIR",
    )
    index: str = option(
        "",
        "make the index of tars that were written elsewhere, as train.py's --data-dir names "
        "them: at an address they are fetched once; interrupted, it goes on where it was",
        metavar="DATA",
    )
    shard_cache: str = option(
        "", "with --index: as train.py's, where fetched tars stay", metavar="DIR"
    )
    shard_cache_size: float = option(
        CACHE_GB, "with --index: as train.py's", metavar="GB", within=POSITIVE
    )


@dataclass(frozen=True)
class ShardConfig(SourceConfig, OutputConfig, ExistingConfig):
    """Everything that the command is asked for."""


MAKING = tuple(
    field.name
    for cls in (SourceConfig, OutputConfig)
    for field in options.options_of(cls)
    if field.name not in ("source", "out", "workers")
)
"""Options of making shards alone."""
INDEXING = ("shard_cache", "shard_cache_size")
"""Options of making an index alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        f"{parser.prog} --source SRC --out DIR [options]\n"
        f"       {parser.prog} --check DIR | --repair DIR [--workers N]\n"
        f"       {parser.prog} --index DATA [--shard-cache DIR] [--shard-cache-size GB]"
    )
    parser.description = (
        "Write images as WebDataset shards (train-000000.tar …, val-000000.tar …) in seeded "
        "random order, with an index for exact epochs. Original bytes are kept unless "
        "--short-side is given. The folder appears only when it is complete."
    )
    for title, cls in (
        ("source", SourceConfig),
        ("output", OutputConfig),
        ("shards that exist", ExistingConfig),
    ):
        options.add_flags(parser.add_argument_group(title), cls)
