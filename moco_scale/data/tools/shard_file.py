"""Writing of one shard: reads its images from their sources, and returns their places."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from moco_scale.data.images.decode import DecodeError, decode_rgb
from moco_scale.data.images.formats import LFS_POINTER, START_BYTES, suffix_to_write
from moco_scale.data.shards.index_file import INDEX_DTYPE
from moco_scale.data.shards.tar_scan import scan_tar
from moco_scale.data.tools.layout import TOO_LARGE, Skipped, SourceImage
from moco_scale.data.tools.source_folder import NOT_READABLE
from moco_scale.data.tools.source_zip import unpack
from moco_scale.untrusted.documents import without_waiting
from moco_scale.untrusted.limits import IMAGE_FILE
from moco_scale.utils.errors import UserError, open_failure
from moco_scale.utils.files import sync
from moco_scale.utils.text import printable


@dataclass(frozen=True)
class Encoding:
    """Re-encoding of images: larger ones are shrunk to short_side and saved as JPEG."""

    short_side: int
    quality: int


class Task(NamedTuple):
    """Shard to write."""

    folder: str
    split: str
    shard: int
    first_key: int  # keys are numbers in the order of the split
    images: list[SourceImage]
    verify: bool
    encoding: Encoding | None


class Done(NamedTuple):
    """Shard written."""

    rows: np.ndarray  # of INDEX_DTYPE; "shard" is still 0
    bytes: int
    checksum: str  # hex BLAKE2b-128 of the file
    skipped: list[Skipped]


def shard_name(split: str, number: int) -> str:
    """Name a shard's file."""
    return f"{split}-{number:06d}.tar"


def write_shard(task: Task) -> Done:
    """Write one shard and read its headers back.

    Raises:
        UserError: The source cannot be read, or the shard cannot be written.
    """
    import webdataset

    path = Path(task.folder) / shard_name(task.split, task.shard)
    labels, skipped = [], []
    _read_ahead(task.images)
    with write_errors(path.parent), _Sink(path) as sink:
        writer = webdataset.ShardWriter(
            f"{task.split}-%06d.tar",
            maxcount=len(task.images) + 1,
            maxsize=float("inf"),
            start_shard=task.shard,
            verbose=0,
            opener=lambda name: sink,
            encoder=False,
            mtime=0,
            user="",
            group="",
        )
        for key, image in enumerate(task.images, start=task.first_key):
            try:
                data = source_bytes(image)
                suffix = suffix_to_write(image.name, data[:START_BYTES])
                if task.verify or task.encoding is not None:
                    data, suffix = _checked(data, suffix, task.encoding)
            except DecodeError as error:
                skipped.append(Skipped(task.split, image.name, str(error)))
                continue
            label = str(image.label).encode()
            writer.write({"__key__": f"{key:09d}", suffix[1:]: data, "cls": label})
            labels.append(image.label)
        writer.close()
    sync(path)
    rows = _rows(path, labels)
    return Done(rows, path.stat().st_size, sink.hash.hexdigest(), skipped)


class _Sink:
    """File that ShardWriter writes to, with the BLAKE2b-128 of its bytes.

    After an error tarfile, when it is collected, writes once more; that is dropped here, or it
    would end as a second traceback.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._closed = False
        self.hash = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._file.close()

    def write(self, data: bytes) -> int:
        if self._closed:
            return len(data)
        self.hash.update(data)
        return self._file.write(data)


def _checked(data: bytes, suffix: str, encoding: Encoding | None) -> tuple[bytes, str]:
    """Return the bytes to write and their suffix. Raises DecodeError: they are no image."""
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
        np.ascontiguousarray(resized), encoding.quality, colorsubsampling="420", fastdct=False
    )
    return smaller, ".jpg"


def _rows(path: Path, labels: Sequence[int]) -> np.ndarray:
    """Make the index of a finished shard from its headers; "shard" is filled in later."""
    rows = np.zeros(len(labels), INDEX_DTYPE)
    if labels:
        scan = scan_tar(path)
        rows["offset"], rows["size"], rows["label"] = scan.offset, scan.size, labels
    return rows


_sources: dict[str, int] = {}  # file descriptors of the tars this process reads from


def _open_source(container: str) -> int:
    try:
        if container not in _sources:
            _sources[container] = os.open(container, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(container, error) from error
    return _sources[container]


def close_sources() -> None:
    """Close the tars that were read, which may be replaced before the next run."""
    while _sources:
        os.close(_sources.popitem()[1])


def source_bytes(image: SourceImage) -> bytes:
    """Read an image's bytes. Raises DecodeError: it is bad; UserError: the disk fails."""
    data = _own_bytes(image) if image.offset == 0 else _archived_bytes(image)
    if not data:
        raise DecodeError("empty file")
    if len(data) > IMAGE_FILE:
        raise DecodeError(TOO_LARGE)
    if data.startswith(LFS_POINTER):
        raise DecodeError("a pointer of Git LFS and not the image: run `git lfs pull` first")
    return data


def _own_bytes(image: SourceImage) -> bytes:
    """Read a file of its own, or a member after its header."""
    try:
        with open(image.container, "rb", opener=without_waiting) as file:
            return file.read(IMAGE_FILE + 1)
    except OSError as error:
        if error.errno in NOT_READABLE:
            raise DecodeError(f"cannot be read: {error.strerror or error}") from error
        raise _unreadable(image.container, error) from error


def _archived_bytes(image: SourceImage) -> bytes:
    size = image.size if image.packed is None else image.packed.size
    try:
        data = os.pread(_open_source(image.container), size, image.offset)
    except OSError as error:
        raise _unreadable(image.container, error) from error
    if len(data) != size:
        raise UserError(f"{printable(image.container)} became shorter while it was read.")
    if image.packed is None:
        return data
    try:
        return unpack(data, image.size, image.packed)
    except ValueError as error:
        raise DecodeError(str(error)) from error


def _unreadable(container: str, error: OSError) -> UserError:
    return UserError(f"Cannot read {printable(container)}: {open_failure(error)}.")


def _read_ahead(images: Sequence[SourceImage]) -> None:
    """Ask the kernel to read the next images of the tars, in disk order."""
    if not hasattr(os, "posix_fadvise"):
        return
    for image in images:
        if image.offset:
            handle = _open_source(image.container)
            size = image.size if image.packed is None else image.packed.size
            os.posix_fadvise(handle, image.offset, size, os.POSIX_FADV_WILLNEED)


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Convert errors of the file system while writing to one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"The disk is full: no room left in {folder.parent}. Nothing was written."
        else:
            message = f"Cannot write shards in {folder.parent}: {error.strerror or error}."
        raise UserError(message) from error
