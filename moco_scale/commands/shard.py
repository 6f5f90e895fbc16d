"""``python -m moco_scale shard``: images to WebDataset shards with an index."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from moco_scale import __version__
from moco_scale.config.flag_types import positive
from moco_scale.data.open import data_set
from moco_scale.data.remote.shard_source import CACHE_GB, ShardSource
from moco_scale.data.shards.recognise import look_into
from moco_scale.data.shards.shard_list import list_shards
from moco_scale.data.tools.check import check
from moco_scale.data.tools.ilsvrc import ACCEPTED, DEVKIT_TAR, TRAIN_TAR, VAL_TAR, read_ground_truth
from moco_scale.data.tools.layout import Listing, arrange, class_name
from moco_scale.data.tools.output_folder import LEFT_OUT, OutputFolder
from moco_scale.data.tools.repair import repair
from moco_scale.data.tools.source_scan import holds_images, scan
from moco_scale.data.tools.source_tar import UNPACKED
from moco_scale.data.tools.writer import Encoding, ShardSize, write_shards
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import size_text
from moco_scale.utils.log import tell
from moco_scale.utils.signals import is_ignored
from moco_scale.utils.text import printable

DEFAULT_QUALITY = 90
_MOST_REASONS = 5
# What is for one of the tasks alone.
_MAKING = (
    *("val_source", "val_ground_truth", "train_only", "unlabelled", "per_class", "overwrite"),
    *("shard_size", "short_side", "quality", "verify", "seed"),
)
_INDEXING = ("shard_cache", "shard_cache_size")


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
    source = parser.add_argument_group("source")
    source.add_argument(
        "--source",
        type=_path,
        metavar="SRC",
        help="a folder with train/CLASS/* and perhaps val/CLASS/*, or CLASS/*, or unlabelled "
        "images; a zip or a tar of one (.gz .bz2 .xz: decompressed once next to DIR, which needs "
        "room); "
        f"{TRAIN_TAR}; or the folder that holds {TRAIN_TAR}, {VAL_TAR} and {DEVKIT_TAR}",
    )
    source.add_argument(
        "--val-source",
        type=_path,
        metavar="SRC",
        help=f"validation images from elsewhere, e.g. {VAL_TAR}",
    )
    source.add_argument(
        "--val-ground-truth",
        type=_path,
        metavar="FILE",
        help=f"the classes of validation images that lie in no class folders. {ACCEPTED}",
    )
    source.add_argument("--train-only", action="store_true", help="write no validation images")
    source.add_argument(
        "--unlabelled", action="store_true", help="take all images, whatever folder they lie in"
    )
    source.add_argument(
        "--per-class",
        type=_positive,
        metavar="N",
        help="only the first N training images of each class, by name",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=_path, metavar="DIR", help="folder to make")
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the shards in DIR, once the new ones are complete",
    )
    output.add_argument(
        "--shard-size",
        type=_shard_size,
        metavar="N",
        help="images in a shard, or their size in SRC, as in 256MB (default: 1000)",
    )
    output.add_argument(
        "--short-side",
        type=_positive,
        metavar="N",
        help="shrink larger images so that their shorter side has N pixels, and save them as "
        "JPEG; smaller ones keep their bytes",
    )
    output.add_argument(
        "--quality",
        type=_quality,
        metavar="Q",
        help=f"JPEG quality with --short-side, 1 to 100 (default: {DEFAULT_QUALITY})",
    )
    output.add_argument(
        "--verify",
        action="store_true",
        help=f"decode every image; leave out and list in DIR/{LEFT_OUT} those that are damaged",
    )
    output.add_argument("--seed", type=_whole, metavar="N", help="of the random order (default: 0)")
    output.add_argument(
        "--workers",
        type=_positive,
        default=_cores(),
        metavar="N",
        help="processes; they do not change the shards (default: the cores there are, %(default)s)",
    )

    existing = parser.add_argument_group("shards that exist")
    existing.add_argument(
        "--check",
        type=_path,
        metavar="DIR",
        help="read every byte, decode every image, compare with the index; status 1 and a list "
        "when something is damaged",
    )
    existing.add_argument(
        "--repair",
        type=_path,
        metavar="DIR",
        help="make the index again from the tars, and damaged tars from what can be read of them; "
        f"what is lost is listed in DIR/{LEFT_OUT}, and what is replaced stays beside it",
    )
    existing.add_argument(
        "--index",
        metavar="DATA",
        help="make the index of tars that were written elsewhere, as train.py's --data-dir names "
        "them: at an address they are fetched once; interrupted, it goes on where it was",
    )
    existing.add_argument(
        "--shard-cache", metavar="DIR", help="with --index: as train.py's, where fetched tars stay"
    )
    existing.add_argument(
        "--shard-cache-size", type=positive, metavar="GB", help="with --index: as train.py's"
    )


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for: make shards, check, repair or index them.

    Raises UserError; then nothing is left behind.
    """
    asked = [flag for flag in ("source", "out", "check", "repair", "index") if getattr(args, flag)]
    useless = _given(args, _MAKING) if asked in (["check"], ["repair"], ["index"]) else []
    useless += _given(args, _INDEXING) if asked != ["index"] else []
    if useless and asked:
        raise UserError(f"{', '.join(useless)} would change nothing with --{asked[0]}")
    if asked == ["index"]:
        return _index(args)
    if asked == ["check"]:
        return check(args.check, args.workers)
    if asked == ["repair"]:
        return repair(args.repair, args.workers)
    if asked != ["source", "out"]:
        raise UserError(
            "give --source and --out to make shards, or --check, --repair or --index alone"
            + (f"; not {' and '.join('--' + flag for flag in asked)}" if asked else "")
        )
    if args.quality is not None and args.short_side is None:
        raise UserError("--quality is for images that are re-encoded: give --short-side too.")
    sources = [path for path in (args.source, args.val_source) if path is not None]
    if os.path.realpath(args.out) in map(os.path.realpath, sources):
        raise UserError(f"--out {args.out} is the source itself; name a folder that is to be made.")
    started = time.monotonic()
    with _terminable(), OutputFolder(args.out, args.overwrite) as folder:
        for note in folder.notes:
            tell(note)
        try:
            listing = _list(args, folder.path)
        except OSError as error:
            where = error.filename or args.source
            raise UserError(f"Cannot read {where}: {error.strerror or error}.") from error
        for note in listing.notes:
            tell(f"note: {note}")
        tell(_plan(listing))
        encoding = None
        if args.short_side is not None:
            encoding = Encoding(args.short_side, args.quality or DEFAULT_QUALITY)
        written = write_shards(
            listing,
            folder.path,
            seed=args.seed or 0,
            shard_size=args.shard_size or ShardSize(),
            encoding=encoding,
            verify=args.verify,
            workers=args.workers,
            made=_made(args),
        )
        for leftover in folder.path.glob(f"{UNPACKED}*"):
            leftover.unlink()
        folder.finish()
    for split in written:
        tell(
            f"{split.split}: {split.images} images in {split.shards} "
            f"shard{'s' * (split.shards != 1)}, {size_text(split.bytes)}"
        )
    _report_skipped(listing, args.out)
    tell(f"{args.out} is complete ({time.monotonic() - started:.1f} s)")
    return 0


def _given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return the flags of these names that are on the command line."""
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if getattr(args, name) is not None and getattr(args, name) is not False
    ]


def _index(args: argparse.Namespace) -> int:
    """Make the index of tars that have none, and say what they are. Raises UserError."""
    size = CACHE_GB if args.shard_cache_size is None else args.shard_cache_size
    data = data_set(ShardSource(args.index, args.shard_cache or "", size))
    with _terminable():
        data.index()
    tell(f"{data.source} has its index (splits: {', '.join(sorted(data.splits))})")
    return 0


def _list(args: argparse.Namespace, scratch: Path) -> Listing:
    """Find the images of all sources and label them."""
    source, val_source, truth = args.source, args.val_source, args.val_ground_truth
    if os.path.isfile(source / TRAIN_TAR):  # the folder ILSVRC2012 was downloaded to
        if val_source is None and os.path.isfile(source / VAL_TAR):
            val_source = source / VAL_TAR
            if truth is None and os.path.isfile(source / DEVKIT_TAR):
                truth = source / DEVKIT_TAR
        source = source / TRAIN_TAR
    if args.train_only:
        val_source = truth = None
    labelled = "" if args.unlabelled else _samples_in(source)
    ours = (args.out, scratch)  # which may lie in the source
    entries, notes = scan(source, scratch, ours)
    val_entries = None
    if val_source is not None:
        val_entries, val_notes = scan(val_source, scratch, ours)
        notes += val_notes
    listing = arrange(
        str(source),
        entries,
        val_source=None if val_source is None else str(val_source),
        val_entries=val_entries,
        ground_truth=None if truth is None else functools.partial(read_ground_truth, truth),
        unlabelled=args.unlabelled,
        train_only=args.train_only,
        per_class=args.per_class,
    )
    if labelled and not listing.classes:
        raise _are_samples(source, labelled)
    listing.notes[:0] = notes
    return listing


def _samples_in(source: Path) -> str:
    """Which samples with labels of their own a tar seems to hold; "": none.

    Raises UserError: it, or the tars in a folder without images, holds nothing else.
    """
    tar = _first_tar(source) if source.is_dir() else source
    if tar is None or not tar.is_file():
        return ""
    seems = look_into(tar)
    if seems.labelled and (source.is_dir() or not seems.folders):
        raise _are_samples(source, seems.labelled)
    return seems.labelled


def _first_tar(folder: Path) -> Path | None:
    """One of the tars that are all there is in a folder; None: there is something else."""
    with contextlib.suppress(UserError, OSError):
        found = None if holds_images(folder) else list_shards(str(folder))
        if found is not None:
            return found.folder / next(iter(found.splits.values()))[0]
    return None


def _are_samples(source: Path, labelled: str) -> UserError:
    packed = source.is_file() and not source.name.lower().endswith(".tar")
    how = "once it is decompressed" if packed else f"as it is, with --data-dir {source}"
    return UserError(
        f"{source} holds samples with labels of their own, as WebDataset has them ({labelled}): it "
        f"can be trained on {how}. To make shards of the images in a tar without their labels, "
        "give --unlabelled"
    )


def _made(args: argparse.Namespace) -> dict[str, object]:
    """What goes into index.json about how the shards were made (not: when, or by how many)."""
    return {
        "by": f"moco_scale {__version__}",
        "source": class_name(args.source.name),
        "per_class": args.per_class,
        "short_side": args.short_side,
        "quality": None if args.short_side is None else args.quality or DEFAULT_QUALITY,
        "verified": args.verify,
    }


def _plan(listing: Listing) -> str:
    parts = [
        f"{len(images)} {split} images ({size_text(sum(p.size for p in images))})"
        for split, images in listing.splits.items()
    ]
    classes = f" of {len(listing.classes)} classes" if listing.classes else ""
    return f"found {' and '.join(parts)}{classes}"


def _report_skipped(listing: Listing, out: Path) -> None:
    if not listing.skipped:
        return
    count = len(listing.skipped)
    tell(f"left out {count} image{'s' * (count != 1)}; the list is {out / LEFT_OUT}:")
    reasons = Counter(entry.reason for entry in listing.skipped)
    for reason, number in reasons.most_common(_MOST_REASONS):
        example = next(entry for entry in listing.skipped if entry.reason == reason)
        name = printable(example.name)
        tell(f"  {number} x {printable(reason)} (as {example.split}: {name})")
    if len(reasons) > _MOST_REASONS:
        tell(f"  and {len(reasons) - _MOST_REASONS} other reasons")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End the program orderly on SIGTERM (a scheduler's) and SIGHUP (a closed terminal's)."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if not is_ignored(n)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _path(text: str) -> Path:
    """A path; an empty one, of a variable that is not set perhaps, does not mean this folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _quality(text: str) -> int:
    number = _whole(text)
    if not 1 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 100")
    return number


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
