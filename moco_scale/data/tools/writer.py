"""Writing of images as WebDataset shards, in seeded random order, with their index.

The output is a function of the images, their names and the seed: the order follows from a hash of
(seed, split, name), each shard is one task, and the tar headers hold no date and no user. So any
number of workers writes the same tars and the same index.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco_scale.data.shards import index_file
from moco_scale.data.shards.header_check import IndexedTars, note_checked
from moco_scale.data.tools.layout import Listing, SourceImage, none_left
from moco_scale.data.tools.output_folder import LEFT_OUT
from moco_scale.data.tools.shard_file import (
    Done,
    Encoding,
    Task,
    close_sources,
    shard_name,
    write_errors,
    write_shard,
)
from moco_scale.observe.side_files import json_line, json_text
from moco_scale.untrusted.shard_index import json_name
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import size_text, sync
from moco_scale.utils.process_pool import BrokenProcessPool, in_order
from moco_scale.utils.progress import Progress
from moco_scale.utils.text import printable


@dataclass(frozen=True)
class ShardSize:
    """Size of a shard: at most so many images, or about so many bytes."""

    images: int | None = 1000
    bytes: int | None = None

    def count(self, images: Sequence[SourceImage]) -> int:
        """Count the shards that these images fill."""
        if self.bytes is not None:
            wanted = -(-sum(p.size for p in images) // self.bytes)
        else:
            assert self.images is not None
            wanted = -(-len(images) // self.images)
        return max(1, min(wanted, len(images)))


class Written(NamedTuple):
    """Result of one split."""

    split: str
    images: int
    shards: int
    bytes: int


def write_shards(
    listing: Listing,
    folder: Path,
    *,
    seed: int,
    shard_size: ShardSize,
    encoding: Encoding | None = None,
    verify: bool = False,
    workers: int = 1,
    made: dict[str, Any] | None = None,
) -> list[Written]:
    """Write all splits of a listing, their index and the list of skipped images.

    Args:
        listing: images to write; skipped ones are added to it.
        folder: an existing folder for the files.
        seed: of the order.
        shard_size: of the shards.
        encoding: of the images.
        verify: decode every image and skip bad ones (an encoding decodes them anyway).
        workers: processes.
        made: goes into index.json.

    Raises:
        UserError: There is not enough room, a source can no longer be read, a worker was killed, or
            nothing of a split is left.
    """
    import webdataset  # noqa: F401  (takes seconds; here, so that forked workers have it)

    if encoding is None:
        _check_room(listing, folder)
    header: dict[str, Any] = {
        "format": index_file.FORMAT,
        "version": index_file.VERSION,
        "classes": [json_name(name) for name in listing.classes],
        "splits": {},
    }
    splits: list[Written] = []
    for split, images in listing.splits.items():
        ordered = random_order(images, seed, split)
        tasks = _tasks(folder, split, ordered, shard_size, verify, encoding)
        all_rows: list[np.ndarray] = []
        shards: list[tuple[str, int, int]] = []
        checksums: list[str] = []
        for number, done in enumerate(_run(tasks, workers, len(ordered), split)):
            listing.skipped += done.skipped
            old = folder / shard_name(split, number)
            if len(done.rows) == 0:
                old.unlink()
                continue
            done.rows["shard"] = len(shards)
            name = shard_name(split, len(shards))
            if name != old.name:  # an earlier shard had nothing to hold
                old.rename(folder / name)
            all_rows.append(done.rows)
            shards.append((name, done.bytes, len(done.rows)))
            checksums.append(done.checksum)
        if not shards:
            raise none_left(split, len(ordered), listing.skipped)
        rows = np.concatenate(all_rows)
        with write_errors(folder):
            np.save(folder / index_file.index_name(split), rows, allow_pickle=False)
            sync(folder / index_file.index_name(split))
        entry = index_file.split_entry(split, rows, shards, checksums)
        header["splits"][split] = entry
        paths = [folder / name for name, _, _ in shards]
        changed = [path.stat().st_mtime_ns for path in paths]
        with write_errors(folder):
            note_checked(IndexedTars(folder, split, entry["checksum"], paths, changed, rows))
        splits.append(Written(split, len(rows), len(shards), sum(size for _, size, _ in shards)))
    said = {k: printable(v, 4096) if isinstance(v, str) else v for k, v in (made or {}).items()}
    header["made"] = {**said, "seed": seed, "left_out": len(listing.skipped)}
    with write_errors(folder):
        if listing.skipped:
            _write(folder / LEFT_OUT, b"".join(json_line(e._asdict()) for e in listing.skipped))
        _write(folder / index_file.INDEX_JSON, json_text(header, indent=1).encode())
    return splits


def random_order(images: Sequence[SourceImage], seed: int, split: str) -> list[SourceImage]:
    """Sort images by a hash of (seed, split, name).

    This random order depends on no generator, and an image's place hardly depends on the others.
    """
    start = hashlib.blake2b(f"{seed}/{split}/".encode(), digest_size=16)

    def key(image: SourceImage) -> bytes:
        digest = start.copy()
        digest.update(os.fsencode(image.name))
        return digest.digest()

    return sorted(images, key=key)


def _tasks(
    folder: Path,
    split: str,
    ordered: list[SourceImage],
    shard_size: ShardSize,
    verify: bool,
    encoding: Encoding | None,
) -> Iterator[Task]:
    """Make one task a shard; their numbers of images differ by at most one."""
    count = shard_size.count(ordered)
    for shard in range(count):
        first, last = (len(ordered) * n // count for n in (shard, shard + 1))
        part = ordered[first:last]
        yield Task(str(folder), split, shard, first, part, verify, encoding)


def _run(tasks: Iterable[Task], workers: int, total: int, split: str) -> Iterator[Done]:
    """Yield the results in the order of the tasks."""
    try:
        with Progress(split, total) as progress:
            for task, done in in_order(write_shard, tasks, workers):
                yield done
                progress.add(len(task.images))
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, probably for want of memory. "
            f"Nothing was written; try fewer than --workers {workers}."
        ) from error
    finally:
        close_sources()


def _check_room(listing: Listing, folder: Path) -> None:
    """Raise UserError when the shards cannot fit: per image two headers and two bodies.

    Sizes in a zip may be wrong, but no more than they say is written.
    """
    block = tarfile.BLOCKSIZE
    needed = sum(
        3 * block + -(-image.size // block) * block
        for images in listing.splits.values()
        for image in images
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The shards need {size_text(needed)}, and {folder.parent} has only "
            f"{size_text(free)} left. Free some, write elsewhere, or shrink the images "
            "(--short-side)."
        )


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
