"""Writes pictures as WebDataset shards, in seeded random order, with their index.

What is written is a function of the pictures, their names and the seed: the order follows from a
hash of (seed, split, name), each shard is one task, and the tar headers hold no date and no user.
So any number of workers writes the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from moco_scale.data import index
from moco_scale.data.decode import DecodeError, decode_rgb
from moco_scale.data.layout import LeftOut, Listing, Picture
from moco_scale.data.output_folder import LEFT_OUT, sync
from moco_scale.errors import UserError

_JPEG_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif"))
_LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class ShardSize:
    """At most so many pictures, or about so many bytes, in a shard."""

    pictures: int | None = 1000
    bytes: int | None = None

    def count(self, pictures: Sequence[Picture]) -> int:
        """How many shards these pictures fill."""
        if self.bytes is not None:
            wanted = -(-sum(p.size for p in pictures) // self.bytes)
        else:
            assert self.pictures is not None
            wanted = -(-len(pictures) // self.pictures)
        return max(1, min(wanted, len(pictures)))


@dataclass(frozen=True)
class Encoding:
    """How pictures are changed on the way: larger ones shrunk to short_side and saved as JPEG."""

    short_side: int
    quality: int


class Written(NamedTuple):
    """What one split became."""

    split: str
    pictures: int
    shards: int
    bytes: int


class _Task(NamedTuple):
    folder: str
    split: str
    shard: int
    first_key: int
    pictures: list[Picture]
    verify: bool
    encoding: Encoding | None


class _Done(NamedTuple):
    rows: np.ndarray
    bytes: int
    left_out: list[LeftOut]


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
    """Write all splits of a listing, their index and the list of what was left out.

    folder: an existing folder for the files. verify: decode every picture and leave out those that
    cannot be decoded (with an encoding they are decoded anyway); what is left out is added to
    listing.left_out. made: goes into index.json.

    Raises UserError: not enough room, a source that can no longer be read, a worker that was
    killed, a split of which nothing is left.
    """
    import webdataset  # noqa: F401  (takes seconds; here, so that forked workers have it)

    if encoding is None:
        _check_room(listing, folder)
    header: dict[str, Any] = {
        "format": index.FORMAT,
        "version": index.VERSION,
        "classes": listing.classes,
        "splits": {},
    }
    written = []
    for split, pictures in listing.splits.items():
        ordered = random_order(pictures, seed, split)
        tasks = _tasks(folder, split, ordered, shard_size, verify, encoding)
        all_rows: list[np.ndarray] = []
        shards: list[tuple[str, int, int]] = []
        for number, done in enumerate(_run(tasks, workers, len(ordered), split)):
            listing.left_out += done.left_out
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
        if not shards:
            raise UserError(f"None of the {len(ordered)} {split} pictures can be decoded.")
        rows = np.concatenate(all_rows)
        with _write_errors(folder):
            np.save(folder / index.index_name(split), rows, allow_pickle=False)
            sync(folder / index.index_name(split))
        header["splits"][split] = index.split_entry(split, rows, shards)
        written.append(Written(split, len(rows), len(shards), sum(size for _, size, _ in shards)))
    header["made"] = {**(made or {}), "seed": seed, "left_out": len(listing.left_out)}
    with _write_errors(folder):
        if listing.left_out:
            lines = (json.dumps(entry._asdict(), ensure_ascii=False) for entry in listing.left_out)
            _write_text(folder / LEFT_OUT, "".join(f"{line}\n" for line in lines))
        _write_text(folder / index.INDEX_JSON, json.dumps(header, indent=1, ensure_ascii=False))
    return written


def random_order(pictures: Sequence[Picture], seed: int, split: str) -> list[Picture]:
    """The pictures sorted by a hash of (seed, split, name): a seeded random order that does not
    depend on any generator, and in which a picture's place hardly depends on the others."""
    start = hashlib.blake2b(f"{seed}/{split}/".encode(), digest_size=16)

    def key(picture: Picture) -> bytes:
        digest = start.copy()
        digest.update(os.fsencode(picture.name))
        return digest.digest()

    return sorted(pictures, key=key)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def _tasks(
    folder: Path,
    split: str,
    ordered: list[Picture],
    shard_size: ShardSize,
    verify: bool,
    encoding: Encoding | None,
) -> Iterator[_Task]:
    """One task a shard; their numbers of pictures differ by at most one."""
    count = shard_size.count(ordered)
    for shard in range(count):
        first, last = (len(ordered) * n // count for n in (shard, shard + 1))
        part = ordered[first:last]
        yield _Task(str(folder), split, shard, first, part, verify, encoding)


def _run(tasks: Iterable[_Task], workers: int, total: int, split: str) -> Iterator[_Done]:
    """The results in the order of the tasks."""
    progress = _Progress(split, total)
    with progress:
        if workers <= 1:
            for task in tasks:
                yield _write_shard(task)
                progress.add(len(task.pictures))
            return
        # Forked, so that the workers need not import everything again; they run no torch.
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), initializer=_start_worker
        )
        pending: deque[tuple[int, Future[_Done]]] = deque()
        try:
            for task in tasks:
                pending.append((len(task.pictures), pool.submit(_write_shard, task)))
                if len(pending) > 4 * workers:  # tasks hold lists of pictures: not all at once
                    count, future = pending.popleft()
                    yield future.result()
                    progress.add(count)
            while pending:
                count, future = pending.popleft()
                yield future.result()
                progress.add(count)
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process was killed, probably for want of memory. "
                f"Nothing was written; try fewer than --workers {workers}."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Progress:
    """A bar on a terminal, otherwise a line now and then."""

    def __init__(self, split: str, total: int) -> None:
        self._split, self._total, self._count = split, total, 0
        self._quiet_until = time.monotonic() + _LINE_SECONDS
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> None:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, desc=self._split, unit=" pictures")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._quiet_until:
            print(f"{self._split}: {self._count} of {self._total} pictures", file=sys.stderr)
            self._quiet_until = time.monotonic() + _LINE_SECONDS


def _start_worker() -> None:
    """Interrupts are the main process's business; a worker ends when that process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(task: _Task) -> _Done:
    """Write one shard and read its headers back."""
    import webdataset

    path = Path(task.folder) / shard_name(task.split, task.shard)
    labels, left_out = [], []
    _read_ahead(task.pictures)
    with _write_errors(path.parent), contextlib.ExitStack() as stack:

        def opener(name: str) -> BinaryIO:
            return stack.enter_context(open_shard(path.parent / name))

        writer = webdataset.ShardWriter(
            f"{task.split}-%06d.tar",
            maxcount=len(task.pictures) + 1,
            maxsize=float("inf"),
            start_shard=task.shard,
            verbose=0,
            opener=opener,
            encoder=False,
            mtime=0,
            user="",
            group="",
        )
        for key, picture in enumerate(task.pictures, start=task.first_key):
            data = _source_bytes(picture)
            if not data:
                left_out.append(LeftOut(task.split, picture.name, "empty file"))
                continue
            suffix = PurePosixPath(picture.name).suffix.lower()
            suffix = ".jpg" if suffix in _JPEG_SUFFIXES else suffix
            if task.verify or task.encoding is not None:
                try:
                    data, suffix = _checked(data, suffix, task.encoding)
                except DecodeError as error:
                    left_out.append(LeftOut(task.split, picture.name, str(error)))
                    continue
            label = str(picture.label).encode()
            writer.write({"__key__": f"{key:09d}", suffix[1:]: data, "cls": label})
            labels.append(picture.label)
        writer.close()
    sync(path)
    rows = _rows(path, labels)
    return _Done(rows, path.stat().st_size, left_out)


def open_shard(path: Path) -> BinaryIO:
    return path.open("wb")


def _checked(data: bytes, suffix: str, encoding: Encoding | None) -> tuple[bytes, str]:
    """The bytes to write and their suffix; DecodeError when they are no picture."""
    rgb = decode_rgb(data)
    if encoding is None:
        return data, suffix
    height, width = rgb.shape[:2]
    short = min(height, width)
    if short <= encoding.short_side:  # never enlarged; and not compressed twice for nothing
        return data, suffix
    size = tuple(max(1, round(side * encoding.short_side / short)) for side in (width, height))
    resized = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    smaller: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(resized), encoding.quality, colorsubsamp="420"
    )
    return smaller, ".jpg"


def _rows(path: Path, labels: Sequence[int]) -> np.ndarray:
    """The index of a finished shard, from its own headers; "shard" is still to be filled in."""
    rows = np.zeros(len(labels), index.INDEX_DTYPE)
    if not labels:
        return rows
    with tarfile.open(path, "r:") as tar:
        pictures = [m for m in tar if not m.name.endswith(".cls")]
    rows["offset"] = [member.offset_data for member in pictures]
    rows["size"] = [member.size for member in pictures]
    rows["label"] = labels
    return rows


@functools.lru_cache(maxsize=8)
def _open_source(container: str) -> BinaryIO:
    try:
        return open(container, "rb")  # closed when the cache drops it
    except OSError as error:
        raise UserError(f"Cannot read {container}: {error.strerror or error}.") from error


def _source_bytes(picture: Picture) -> bytes:
    try:
        if picture.offset == 0:  # a file of its own; in a tar a header comes first
            return Path(picture.container).read_bytes()
        file = _open_source(picture.container)
        file.seek(picture.offset)
        data = file.read(picture.size)
    except OSError as error:
        raise UserError(f"Cannot read {picture.container}: {error.strerror or error}.") from error
    if len(data) != picture.size:
        raise UserError(f"{picture.container} became shorter while it was read.")
    return data


def _read_ahead(pictures: Sequence[Picture]) -> None:
    """Tell the kernel what of the tars is wanted next: it reads in the order of the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for picture in pictures:
        if picture.offset:
            handle = _open_source(picture.container).fileno()
            os.posix_fadvise(handle, picture.offset, picture.size, os.POSIX_FADV_WILLNEED)


def _check_room(listing: Listing, folder: Path) -> None:
    """UserError when the shards cannot fit: per picture two headers and two padded bodies."""
    block = tarfile.BLOCKSIZE
    needed = sum(
        3 * block + -(-picture.size // block) * block
        for pictures in listing.splits.values()
        for picture in pictures
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The shards need {needed / 1e9:.2f} GB, and {folder.parent} has only "
            f"{free / 1e9:.2f} GB left. Free some, write elsewhere, or shrink the pictures "
            "(--short-side)."
        )


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Errors of the file system while writing, as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"The disk is full: no room left in {folder.parent}. Nothing was written."
        else:
            message = f"Cannot write shards in {folder.parent}: {error.strerror or error}."
        raise UserError(message) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
