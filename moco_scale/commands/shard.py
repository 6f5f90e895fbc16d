"""``python -m moco_scale shard``: images to WebDataset shards with an index."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from moco_scale import __version__
from moco_scale.commands.shard_flags import INDEXING, MAKING, ShardConfig, add_arguments
from moco_scale.config import options
from moco_scale.data.open import data_set
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.shards.recognise import look_into
from moco_scale.data.shards.shard_list import list_shards
from moco_scale.data.tools.check import check
from moco_scale.data.tools.ilsvrc import DEVKIT_TAR, TRAIN_TAR, VAL_TAR, read_ground_truth
from moco_scale.data.tools.layout import Listing, arrange, class_name
from moco_scale.data.tools.output_folder import LEFT_OUT, OutputFolder
from moco_scale.data.tools.repair import repair
from moco_scale.data.tools.source_scan import holds_images, scan
from moco_scale.data.tools.source_tar import UNPACKED
from moco_scale.data.tools.writer import Encoding, write_shards
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import size_text
from moco_scale.utils.log import tell
from moco_scale.utils.signals import is_ignored
from moco_scale.utils.text import printable

_MOST_REASONS = 5

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for: make shards, check, repair or index them.

    Raises UserError; then nothing is left behind.
    """
    given = options.given(vars(args), ShardConfig)
    config = ShardConfig(**given)
    options.refuse(options.out_of_range(config))
    asked = [flag for flag in ("source", "out", "check", "repair", "index") if given.get(flag)]
    useless = set(MAKING) if asked in (["check"], ["repair"], ["index"]) else set()
    useless |= set(INDEXING) if asked != ["index"] else set()
    if asked and (names := [f"--{name.replace('_', '-')}" for name in given if name in useless]):
        raise UserError(f"{', '.join(names)} would change nothing with --{asked[0]}")
    if asked == ["index"]:
        return _index(config)
    if config.check is not None and asked == ["check"]:
        return check(config.check, config.workers)
    if config.repair is not None and asked == ["repair"]:
        return repair(config.repair, config.workers)
    source, out = config.source, config.out
    if source is None or out is None or asked != ["source", "out"]:
        raise UserError(
            "give --source and --out to make shards, or --check, --repair or --index alone"
            + (f"; not {' and '.join('--' + flag for flag in asked)}" if asked else "")
        )
    if "quality" in given and config.short_side is None:
        raise UserError("--quality is for images that are re-encoded: give --short-side too.")
    sources = [path for path in (source, config.val_source) if path is not None]
    if os.path.realpath(out) in map(os.path.realpath, sources):
        raise UserError(f"--out {out} is the source itself; name a folder that is to be made.")
    started = time.monotonic()
    with _terminable(), OutputFolder(out, config.overwrite) as folder:
        for note in folder.notes:
            tell(note)
        try:
            listing = _list(config, source, out, folder.path)
        except OSError as error:
            where = error.filename or source
            raise UserError(f"Cannot read {where}: {error.strerror or error}.") from error
        for note in listing.notes:
            tell(f"note: {note}")
        tell(_plan(listing))
        encoding = None
        if config.short_side is not None:
            encoding = Encoding(config.short_side, config.quality)
        written = write_shards(
            listing,
            folder.path,
            seed=config.seed,
            shard_size=config.shard_size,
            encoding=encoding,
            verify=config.verify,
            workers=config.workers,
            made=_made(config, source),
        )
        for leftover in folder.path.glob(f"{UNPACKED}*"):
            leftover.unlink()
        folder.finish()
    for split in written:
        tell(
            f"{split.split}: {split.images} images in {split.shards} "
            f"shard{'s' * (split.shards != 1)}, {size_text(split.bytes)}"
        )
    _report_skipped(listing, out)
    tell(f"{out} is complete ({time.monotonic() - started:.1f} s)")
    return 0


def _index(config: ShardConfig) -> int:
    """Make the index of tars that have none, and say what they are. Raises UserError."""
    data = data_set(ShardSource(config.index, config.shard_cache, config.shard_cache_size))
    with _terminable():
        data.index()
    tell(f"{data.source} has its index (splits: {', '.join(sorted(data.splits))})")
    return 0


def _list(config: ShardConfig, source: Path, out: Path, scratch: Path) -> Listing:
    """Find the images of all sources and label them."""
    val_source, truth = config.val_source, config.val_ground_truth
    if os.path.isfile(source / TRAIN_TAR):  # the folder ILSVRC2012 was downloaded to
        if val_source is None and os.path.isfile(source / VAL_TAR):
            val_source = source / VAL_TAR
            if truth is None and os.path.isfile(source / DEVKIT_TAR):
                truth = source / DEVKIT_TAR
        source = source / TRAIN_TAR
    if config.train_only:
        val_source = truth = None
    labelled = "" if config.unlabelled else _samples_in(source)
    ours = (out, scratch)  # which may lie in the source
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
        unlabelled=config.unlabelled,
        train_only=config.train_only,
        per_class=config.per_class,
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


def _made(config: ShardConfig, source: Path) -> dict[str, object]:
    """What goes into index.json about how the shards were made (not: when, or by how many)."""
    return {
        "by": f"moco_scale {__version__}",
        "source": class_name(source.name),
        "per_class": config.per_class,
        "short_side": config.short_side,
        "quality": None if config.short_side is None else config.quality,
        "verified": config.verify,
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
