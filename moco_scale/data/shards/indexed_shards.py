"""Random access to WebDataset shards through their index."""

from __future__ import annotations

import hashlib
import mmap
import os
import resource
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco_scale.data.remote.prefetch import RemotePart
from moco_scale.data.sampling.order import Order
from moco_scale.data.sampling.windows import order_of
from moco_scale.data.shards import index_file
from moco_scale.data.shards.header_check import IndexedTars, check_headers, tar_problem
from moco_scale.data.shards.index_file import shard_command
from moco_scale.data.shards.protocols import Place
from moco_scale.data.shards.tar_scan import BLOCK, key_in
from moco_scale.untrusted.shard_index import AnyIndex, Tar
from moco_scale.utils.errors import UserError, open_failure
from moco_scale.utils.text import printable


class Scanned(NamedTuple):
    """Shards whose index was made here."""

    index_dir: Path
    """Folder of the index."""
    name: str
    """Name of the set, for messages."""
    splits: dict[str, list[str]]
    """The shards' names."""
    changed: Mapping[str, int]
    """Time of change (ns) of each shard when the index was made."""


class IndexedShards:
    """Images of one split, in shard order, each readable on its own.

    Costs one memory map for the index and one per shard in use. At most a quarter of the process's
    limit on open files is kept open (a mapping holds a file descriptor); opening one more takes
    about 40 microseconds, so with more shards reading is a percent or two slower.

    Objects can be pickled (they reopen the files, without checking all shards again) and used after
    a fork.
    """

    def __init__(
        self,
        data_dir: Path,
        split: str,
        header: AnyIndex,
        rows: np.ndarray,
        selection: np.ndarray | None = None,
        index_dir: Path | None = None,
        name: str = "",
        changed: list[int] | None = None,
        names: list[str] | None = None,
    ) -> None:
        entry = header.splits[split]
        shards: Sequence[Tar] = entry.shards
        self.data_dir = data_dir
        self.index_dir = index_dir or data_dir
        self.name = name or str(data_dir)
        self.split = split
        self.classes: list[str] = list(header.classes)
        #: what the index says about how the shards were made
        self.made: dict[str, Any] = header.made
        self.why_unlabelled = printable(header.made.get("unlabelled", ""))
        self.fingerprint: str = entry.checksum
        self._header = header
        # Names of tars that were scanned here are known without their index.
        names = [shard.name for shard in shards] if names is None else names
        self._shards = [(n, s.bytes) for n, s in zip(names, shards, strict=True)]
        self._all_rows = rows
        self._selection = selection
        self._rows = rows if selection is None else rows[selection]
        if selection is not None:
            chosen = np.ascontiguousarray(selection, dtype="<i8").view(np.uint8).data
            digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
            digest.update(chosen)
            self.fingerprint = digest.hexdigest()
        #: int32 [N], read-only, with gaps: a column of the shared map; -1 = unlabelled
        self.labels: np.ndarray = self._rows["label"].view()
        self.labels.setflags(write=False)
        #: of each shard, the time of change (ns) at which it was right; None: need not be watched
        self._changed = changed
        self._maps: dict[int, mmap.mmap] = {}
        self._max_maps = _max_open_maps()

    @classmethod
    def open(
        cls,
        data_dir: str | Path,
        split: str = "train",
        *,
        scanned: Scanned | None = None,
    ) -> IndexedShards:
        """Open a split and check that all its shards exist with the right size.

        Args:
            data_dir: folder of shards.
            split: name of the split.
            scanned: of shards whose index was made here; they may lie anywhere, at paths relative
                to data_dir.

        Raises:
            UserError: The folder is missing or no folder of shards (for an ImageFolder or a tar the
                message has the command that makes shards), the split is missing, a shard is
                missing, of another size, damaged, or without images where the index has some (see
                `data.shards.header_check`), or the index is damaged or of another version.
        """
        data_dir = Path(data_dir)
        header: AnyIndex
        if scanned is None:
            index_dir, header = data_dir, index_file.read_header(data_dir)
        else:
            index_dir = scanned.index_dir
            header = index_file.read_scanned_header(index_dir, scanned.splits)
        if split not in header.splits:
            known = ", ".join(sorted(header.splits)) or "none"
            raise UserError(
                f"{data_dir} has no split {split!r}; it has: {known}. Make the shards again from a "
                f"source that has {split!r} images (python -m moco_scale shard --help)."
            )
        rows = index_file.read_rows(index_dir, split, header)
        entry = header.splits[split]
        shards: Sequence[Tar] = entry.shards
        names = scanned.splits[split] if scanned else [shard.name for shard in shards]
        paths = [data_dir / shard for shard in names]
        changed = [
            _check_shard(path, shard.bytes, len(paths))
            for path, shard in zip(paths, shards, strict=True)
        ]
        if scanned is None:
            check_headers(IndexedTars(data_dir, split, entry.checksum, paths, changed, rows))
            return cls(data_dir, split, header, rows, changed=changed)
        changed = [scanned.changed[shard] for shard in names]
        return cls(data_dir, split, header, rows, None, index_dir, scanned.name, changed, names)

    def __len__(self) -> int:
        return len(self._rows)

    def order(self, seed: int, window: int = 0) -> Order:
        return order_of(self._rows["shard"], window, seed)

    def rest(self) -> None:
        """Keep the maps for the next batch: nobody removes shards of a folder."""

    def remote_parts(self) -> list[RemotePart]:
        return []

    def read(self, i: int) -> memoryview:
        """Return the encoded bytes of image i, a view into the mapped tar.

        Raises:
            UserError: The shard is gone or has been replaced.
        """
        shard, offset, size = self._locate(i)
        mapped = self._maps.get(shard)
        if mapped is None:
            mapped = self._map(shard)
        # One request for all of the image's pages; otherwise a cold file is read fault by fault.
        start = offset - offset % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, start, offset + size - start)
        return memoryview(mapped)[offset : offset + size]

    def where(self, i: int) -> str:
        """Name the place for messages: "train-000003.tar at byte 12345 (key 000000017)"."""
        return str(self.place(i))

    def place(self, i: int) -> Place:
        """Return the place as shard, byte and key."""
        shard, offset, _ = self._locate(i)
        name = self._shards[shard][0]
        try:
            return Place(name, offset, key_in(self._header_before(shard, offset)))
        except OSError:
            return Place(name, offset, "")

    def _header_before(self, shard: int, offset: int) -> bytes:
        """Read the tar header of the image at `offset`."""
        start, mapped = offset - BLOCK, self._maps.get(shard)
        if mapped is not None:  # its name may have gone
            return mapped[start:offset]
        with self._path(shard).open("rb") as file:
            file.seek(start)
            return file.read(BLOCK)

    def _path(self, shard: int) -> Path:
        """Return the path of the file to open."""
        return self.data_dir / self._shards[shard][0]

    def fault(self, i: int) -> str | None:
        """Describe a change of image i's shard since the index was made; None: none."""
        shard = self._locate(i)[0]
        try:
            _check_shard(self._path(shard), self._shards[shard][1], len(self._shards))
        except UserError as error:
            return str(error)
        return None

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tar of the split."""
        return [size for _, size in self._shards]

    def remedy(self, i: int) -> str:
        """Advise, in messages, what to do about a bad image i."""
        if self.index_dir != self.data_dir:
            shard = self._path(self._locate(i)[0])
            return f"pack {shard} again without it, or with a good copy of it"
        if self.made.get("by"):
            return (
                f"make the shards again with `{shard_command('IMAGES', self.data_dir)} --verify "
                "--overwrite`, which leaves such images out and lists them"
            )
        folder = shlex.quote(str(self.data_dir))
        return f"take it out of the index with `python -m moco_scale shard --repair {folder}`"

    def checkable(self) -> list[str]:
        """Return the folder, unless its tars were chosen by a pattern."""
        whole = self.index_dir == self.data_dir or os.path.abspath(self.name) == str(self.data_dir)
        return [str(self.data_dir)] if whole else []

    def subset(self, indices: np.ndarray) -> IndexedShards:
        """Select images: int64 [M] positions, kept in the given order."""
        return IndexedShards(
            self.data_dir,
            self.split,
            self._header,
            self._all_rows,
            self._selected(indices),
            self.index_dir,
            self.name,
            self._changed,
            [name for name, _ in self._shards],
        )

    def _selected(self, indices: np.ndarray) -> np.ndarray:
        """Map positions to those in the whole split."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or (
            len(indices) and (indices.min() < 0 or indices.max() >= len(self))
        ):
            raise IndexError(f"subset wants positions below {len(self)} in one dimension")
        return indices if self._selection is None else self._selection[indices]

    def __getstate__(self) -> tuple[Any, ...]:
        names = [name for name, _ in self._shards]
        where = self.index_dir, self.name, self._changed, names
        return self.data_dir, self.split, self._header, self._selection, *where

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        data_dir, split, header, selection, index_dir, *more = state
        rows = index_file.map_rows(index_dir, split, header.splits[split].samples)
        self.__init__(data_dir, split, header, rows, selection, index_dir, *more)  # type: ignore[misc]

    def _locate(self, i: int) -> tuple[int, int, int]:
        """Return (shard, offset, size) of image i."""
        if not 0 <= i < len(self._rows):
            raise IndexError(f"image {i} of {len(self._rows)}")
        shard, offset, size, _ = self._rows[i].item()
        return shard, offset, size

    def _map(self, shard: int) -> mmap.mmap:
        path, size = self._path(shard), self._shards[shard][1]
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size != size:  # mapped all the same, reading it could kill the process
                    raise UserError(_wrong_size(path, status.st_size, size))
                self._watch(shard, path, file.fileno(), status.st_mtime_ns)
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise UserError(
                f"Cannot read shard {printable(path)}: {open_failure(error)}."
            ) from error
        self._keep(shard, mapped)
        return mapped

    def _watch(self, shard: int, path: Path, file: int, changed: int) -> None:
        """Raise UserError if a replaced shard does not fit the index."""
        if self._changed is None or changed == self._changed[shard]:
            return
        rows = self._all_rows[self._all_rows["shard"] == shard]
        problem = tar_problem(path, rows, file)
        if problem is not None:
            raise UserError(f"{printable(path)} was changed while it was in use. {problem}")
        self._changed[shard] = changed

    def _keep(self, shard: int, mapped: mmap.mmap) -> None:
        if len(self._maps) >= self._max_maps:
            # The oldest goes; in random order that is as good as the least recently used. Views
            # still in someone's hands keep their map alive until they are dropped.
            self._maps.pop(next(iter(self._maps)), None)
        self._maps[shard] = mapped


def _max_open_maps() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 4096
    return max(8, min(4096, soft // 4))


def _check_shard(path: Path, size: int, of: int) -> int:
    """The time of change, in nanoseconds, of one of so many shards.

    Raises UserError: it is not there, or has another size.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(
            f"Shard {printable(path)} is missing ({of} belong to this split). "
            "Copy it again from where the shards were made, or make them again."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read shard {printable(path)}: {open_failure(error)}.") from error
    if status.st_size != size:
        raise UserError(_wrong_size(path, status.st_size, size))
    return status.st_mtime_ns


def _wrong_size(path: Path, actual: int, expected: int) -> str:
    how = "is truncated" if actual < expected else "was replaced"
    return (
        f"Shard {printable(path)} {how}: it has {actual} bytes, its index says {expected}. "
        "Copy it again from where the shards were made, or make them again."
    )
