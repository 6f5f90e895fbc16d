"""Cache of decoded images of a small set, one a node for all ranks and workers.

A folder holds one file of pixels with a place for every image, whose size is known from its header
before anything is decoded. A process that decodes an image writes its pixels to their place and
then marks it; two that do so at once write the same bytes. Everything is allocated when the folder
is made, so that a full disk or memory is an error at the start and not a bus error later.

Users of the folder hold a shared lock on its file "used". To make, check or remove it takes an
exclusive lock on "changing", and to remove it also an exclusive one on "used".

The folder's name can be foreseen, and others may write beside it: it is used only if it is a folder
and this user's, is closed to others, and only the files named here are ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moco_scale.data.images.decode import DecodeError, Pixels, image_size
from moco_scale.data.shards.protocols import Shards
from moco_scale.untrusted.documents import DocumentError, read_document
from moco_scale.untrusted.limits import META_JSON
from moco_scale.untrusted.pixel_cache import PixelCacheMeta
from moco_scale.utils import locks
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import size_text, sync, write_atomically
from moco_scale.utils.own_folders import ForeignFolderError, make_own, remove_own, without_links

RAM = "ram"
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "moco_scale-pixels-"
_FORMAT = 1
_CONTENT = ("meta.json", "table.npy", "pixels", "done")
_ALL = (*_CONTENT, ".meta.json.tmp", "used", "changing")
_TABLE_DTYPE = np.dtype([("offset", "<u8"), ("height", "<u4"), ("width", "<u4")])
_PROBES = 512  # images from whose sizes a set that is far too large is refused at once
_SPARE = 0.9  # share of a disk's free space that may be taken
_SPARE_MEMORY = 0.5  # likewise of memory


class PixelCache:
    """Pixels of images decoded before, by any process of this node.

    Can be pickled, and used after a fork.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder that `open` has made."""
        self.folder = folder
        self._table = np.load(folder / "table.npy", mmap_mode="r")
        self._pixels = _mapped(folder / "pixels")
        self._done = _mapped(folder / "done")
        self._used: IO[bytes] | None = None
        self.passing = False

    @classmethod
    def open(cls, shards: Shards, place: str, passing: bool = False) -> PixelCache:
        """Open the cache of these images in `place`, a folder on a local disk or RAM.

        A complete one is reused, and keeps what earlier runs decoded. In RAM it is removed with the
        last run on this node that uses it; the next run removes what a killed one left there. With
        `passing` a new one is removed on a disk, too.

        Raises:
            UserError: The images would not fit, or the place cannot be written.
        """
        if shards.remote_parts():
            raise UserError(
                f"--cache {place}: {shards.name} is fetched while it is read; --shard-cache keeps "
                "what was fetched, and --cache the images of local shards"
            )
        parent = SHARED_MEMORY if place == RAM else Path(place)
        mine = f"{PREFIX}{os.geteuid()}-"
        name = f"{mine}{shards.fingerprint[:24]}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if place == RAM:
                for left in parent.glob(f"{mine}*"):
                    if left.name != name:
                        with contextlib.suppress(ForeignFolderError):
                            _remove_unused(left)
            with _changing(parent / name):
                was_there = (parent / name / "meta.json").exists()
                _make_unless_whole(parent / name, shards, place)
                used = _opened(parent / name / "used", "a+b")
                locks.share(used)  # NFS: only of a file that can be read
                cache = cls(parent / name)
        except OSError as error:
            raise UserError(f"--cache {place}: {_reason(error, parent)}") from error
        cache._used, cache.passing = used, place == RAM or (passing and not was_there)
        return cache

    def get(self, i: int) -> Pixels | None:
        """Return pixels of image i, uint8 [H, W, 3], read-only; None if not yet decoded."""
        return self._place(i) if self._done[i] else None

    def put(self, i: int, pixels: Pixels) -> None:
        """Keep pixels of image i, unless its header gave another size."""
        place = self._place(i)
        if place.shape == pixels.shape and not self._done[i]:
            place[...] = pixels
            self._done[i] = 1

    @property
    def filled(self) -> float:
        """Share of the images that are decoded."""
        return float(np.count_nonzero(self._done)) / len(self._done)

    def close(self) -> None:
        """Release the cache; may be called again, but no other method."""
        used, self._used = self._used, None
        if used is None:
            return
        used.close()
        # Somebody removed it, or its disk is full.
        with contextlib.suppress(OSError, DocumentError):
            if self.passing:
                _remove_unused(self.folder)
            else:
                _mark_if_complete(self.folder)

    def _place(self, i: int) -> Pixels:
        offset, height, width = self._table[i].item()
        return self._pixels[offset : offset + 3 * height * width].reshape(height, width, 3)

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    with _opened(path, "r+b") as file:
        # numpy's memmap class makes every access slower.
        return np.asarray(np.memmap(file, np.uint8, mode="r+"))


def _opened(path: Path, mode: str) -> IO[bytes]:
    """Open a file of the folder, but no link."""
    return open(path, mode, opener=without_links)  # type: ignore[return-value]


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock to make, check or remove the folder; make it if need be."""
    while True:
        make_own(folder, mode=0o700)
        try:
            lock = _opened(folder / "changing", "a+b")
        except FileNotFoundError:  # removed in between
            continue
        with lock:
            locks.lock(lock)
            try:
                current = os.path.samestat(os.fstat(lock.fileno()), (folder / "changing").stat())
            except FileNotFoundError:
                current = False
            if current:
                yield
                return


def _remove_unused(folder: Path) -> None:
    """Remove the folder unless it is in use."""
    with _changing(folder), _opened(folder / "used", "a+b") as lock:
        if locks.try_lock(lock):
            remove_own(folder, _ALL)


def _meta(folder: Path, shards: Shards, boot: str, complete: bool) -> PixelCacheMeta:
    """Describe these images and the files that exist. Raises OSError: one is missing."""
    return PixelCacheMeta(
        format=_FORMAT,
        fingerprint=shards.fingerprint,
        decoders=[version("simplejpeg"), version("pillow")],
        sizes={name: os.path.getsize(folder / name) for name in _CONTENT[1:]},
        table=zlib.crc32((folder / "table.npy").read_bytes()),
        boot=boot,
        complete=complete,
    )


def _read_meta(folder: Path) -> PixelCacheMeta:
    return read_document(folder / "meta.json", PixelCacheMeta, META_JSON, "the cache's")


def _write_meta(folder: Path, meta: PixelCacheMeta) -> None:
    write_atomically(folder / "meta.json", meta.model_dump_json(indent=1))


def _make_unless_whole(folder: Path, shards: Shards, place: str) -> None:
    with contextlib.suppress(OSError, DocumentError):
        found = _read_meta(folder)
        # After a crash of the machine a mark may have reached the disk before its pixels.
        trusted = found.complete or found.boot == _boot() != ""
        if trusted and found == _meta(folder, shards, found.boot, found.complete):
            return
    for name in _CONTENT:
        (folder / name).unlink(missing_ok=True)
    _make(folder, shards, place)


def _make(folder: Path, shards: Shards, place: str) -> None:
    """Allocate the files for all images, none decoded. Raises UserError: no room."""
    count = len(shards)
    probes = np.unique(np.linspace(0, count - 1, _PROBES).astype(np.int64))
    mean = sum(3 * h * w for h, w in _sizes(shards, probes)) / len(probes)
    try:
        # Half of the estimate, which may be off; the sizes themselves are taken of fewer images.
        _require_room(int(mean * count / 2), int(mean * count), folder, shards, place)
        table = np.zeros(count, _TABLE_DTYPE)
        table["height"], table["width"] = np.array(list(_sizes(shards, range(count)))).T
        sizes = 3 * table["height"].astype(np.uint64) * table["width"]
        table["offset"][1:] = np.cumsum(sizes)[:-1]
        total = int(sizes.sum())
        _require_room(total + count, total, folder, shards, place)
        with (folder / "table.npy").open("xb") as file:
            np.save(file, table)
        for name, size in (("pixels", max(total, 1)), ("done", count)):
            with (folder / name).open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        _write_meta(folder, _meta(folder, shards, _boot(), complete=False))
    except BaseException:
        with contextlib.suppress(OSError):
            remove_own(folder, _ALL)
        raise


def _mark_if_complete(folder: Path) -> None:
    """Sync the files to the disk once everything is decoded, and mark them as complete."""
    with _changing(folder):
        meta = _read_meta(folder)
        if meta.complete or not np.fromfile(folder / "done", np.uint8).all():
            return
        for name in ("pixels", "done", "table.npy"):
            sync(folder / name)
        _write_meta(folder, meta.model_copy(update={"complete": True}))


def _sizes(shards: Shards, images: Any) -> Iterator[tuple[int, int]]:
    """Yield (height, width) of each upright image; (0, 0) of one that cannot be read."""
    for i in images:
        try:
            yield image_size(shards.read(int(i)))
        except DecodeError:
            yield 0, 0


def _require_room(least: int, total: int, folder: Path, shards: Shards, place: str) -> None:
    room = int(shutil.disk_usage(folder).free * _SPARE)
    where = f"in {folder.parent}"
    if place == RAM:
        room, where = min(room, int(_free_memory() * _SPARE_MEMORY)), "of memory"
    if least > room:
        raise UserError(
            f"--cache {place}: the {len(shards)} images of {shards.name} take about "
            f"{size_text(total)} once decoded, and a cache may take {size_text(room)} {where}. "
            "Leave --cache out, name a folder on a larger local disk, or shrink the images "
            "(python -m moco_scale shard --short-side N)"
        )


def _free_memory() -> int:
    """Bytes that processes can still get: the machine's, or the container's."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        cgroup = Path("/sys/fs/cgroup")
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - int((cgroup / "memory.current").read_text(encoding="ascii")))
    return max(0, free)


def _boot() -> str:
    """Identifier of this start of the machine; "" where it is unknown."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _reason(error: OSError, parent: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no room left in {parent}"
    if error.errno in locks.NO_LOCKS:
        return f"{parent} has no locks ({error.strerror or error}); name a folder on a local disk"
    if isinstance(error, ForeignFolderError):
        return f"{error.strerror or error}; name another folder, or have that removed"
    return f"cannot use {error.filename or parent}: {error.strerror or error}"
