"""Random access to WebDataset shards through an index kept beside the tars.

A folder of shards holds, for each split, ``train-000000.tar … `` and ``train-index.npy``, and once
for all splits ``index.json``. The tars are plain WebDataset files that any tool can stream; the
index is what exact epochs need on top of that: where each picture lies.

``index.json``::

    {"format": "moco_scale shards", "version": 1,
     "classes": ["n01440764", …],            # [] when the pictures have no labels
     "splits": {"train": {"samples": 1281167,
                          "index": "train-index.npy",
                          "checksum": "…",   # BLAKE2b-128 of the rows' bytes
                          "shards": [{"name": "train-000000.tar", "bytes": …, "samples": …,
                                      "checksum": "…"}, …]}},  # of the tar; may be missing
     "made": {…}}                            # how: source, seed, re-encoding, what was left out

``train-index.npy`` is one record of ``INDEX_DTYPE`` a picture, in shard order. It is memory-mapped,
so all processes of a node share one copy of it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moco_scale.data.fetch_ahead import RemotePart
from moco_scale.data.order import Order
from moco_scale.data.shard_set import Place
from moco_scale.data.windows import order_of
from moco_scale.errors import UserError
from moco_scale.files import open_failure

FORMAT = "moco_scale shards"
VERSION = 1
INDEX_JSON = "index.json"
PARTIAL = ".partial-"  # what stands between a folder's name and a suffix while it is being written

# shard: position in the split's list of shards; offset, size: the picture's bytes within that tar;
# label: class number, -1 for none.
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])


def index_name(split: str) -> str:
    return f"{split}-index.npy"


def rows_checksum(rows: np.ndarray) -> str:
    """Hex BLAKE2b-128 of an array of INDEX_DTYPE."""
    contiguous = np.ascontiguousarray(rows)
    return hashlib.blake2b(contiguous.view(np.uint8).data, digest_size=16).hexdigest()


def split_entry(
    split: str,
    rows: np.ndarray,
    shards: Sequence[tuple[str, int, int]],
    checksums: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The entry of one split in index.json.

    shards: (name, bytes, samples) in order. checksums: hex BLAKE2b-128 of each shard's bytes.
    """
    listed: list[dict[str, Any]] = [{"name": n, "bytes": b, "samples": s} for n, b, s in shards]
    if checksums is not None:
        for shard, checksum in zip(listed, checksums, strict=True):
            shard["checksum"] = checksum
    return {
        "samples": len(rows),
        "index": index_name(split),
        "checksum": rows_checksum(rows),
        "shards": listed,
    }


def has_split(data_dir: str | Path, split: str) -> bool:
    """Whether data_dir is a finished folder of shards that has this split."""
    try:
        header = json.loads((Path(data_dir) / INDEX_JSON).read_text(encoding="utf-8"))
        return split in header["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


class IndexedShards:
    """The pictures of one split, in the order of the shards, each readable on its own.

    Costs one memory map for the index and one per shard in use. At most a quarter of the process's
    limit on open files is kept open (a mapping holds a file descriptor); opening one more takes
    about 40 microseconds, so more shards than that are slower by a percent or two, not broken.

    Objects can be pickled (they reopen the files, without checking all shards again) and used
    after a fork.
    """

    def __init__(
        self,
        data_dir: Path,
        split: str,
        header: Mapping[str, Any],
        rows: np.ndarray,
        selection: np.ndarray | None = None,
        index_dir: Path | None = None,
        name: str = "",
    ) -> None:
        entry = header["splits"][split]
        self.data_dir = data_dir
        self.index_dir = index_dir or data_dir
        self.name = name or str(data_dir)
        self.split = split
        self.classes: list[str] = list(header["classes"])
        self.fingerprint: str = entry["checksum"]
        self._header = header
        self._shards = [(s["name"], int(s["bytes"])) for s in entry["shards"]]
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
        self._maps: dict[int, mmap.mmap] = {}
        self._max_maps = _max_open_maps()

    @classmethod
    def open(
        cls,
        data_dir: str | Path,
        split: str = "train",
        *,
        index_dir: Path | None = None,
        name: str = "",
    ) -> IndexedShards:
        """Open a split and check that all its shards are there with the size they should have.

        index_dir: where the index lies, if not beside the shards; these may then lie anywhere, at
        paths relative to data_dir. name: for messages; data_dir by default.

        Raises UserError: no such folder; not a folder of shards (an ImageFolder or a tar: the
        message has the command that makes shards of it); no such split; a shard is missing or has
        another size than the index says; an index that is damaged or of another version.
        """
        data_dir = Path(data_dir)
        header = _read_header(data_dir, index_dir or data_dir)
        if split not in header["splits"]:
            known = ", ".join(sorted(header["splits"])) or "none"
            raise UserError(
                f"{data_dir} has no split {split!r}; it has: {known}. Make the shards again from a "
                f"source that has {split!r} pictures (python -m moco_scale shard --help)."
            )
        rows = read_rows(index_dir or data_dir, split, header)
        _check_shards(data_dir, header["splits"][split])
        return cls(data_dir, split, header, rows, None, index_dir, name)

    def __len__(self) -> int:
        return len(self._rows)

    def order(self, seed: int, window: int = 0) -> Order:
        return order_of(self._rows["shard"], window, seed)

    def rest(self) -> None:
        """Nobody removes shards of a folder, so maps are kept for the next batch."""

    def remote_parts(self) -> list[RemotePart]:
        return []

    def read(self, i: int) -> memoryview:
        """The encoded bytes of picture i, not copied: a view into the mapped tar.

        Raises UserError when the shard has gone or changed its size since the index was made.
        """
        shard, offset, size = self._locate(i)
        mapped = self._maps.get(shard)
        if mapped is None:
            mapped = self._map(shard)
        # One request for all of the picture's pages; otherwise a cold file is read fault by fault.
        start = offset - offset % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, start, offset + size - start)
        return memoryview(mapped)[offset : offset + size]

    def where(self, i: int) -> str:
        """For messages: "train-000003.tar at byte 12345 (key 000000017)"."""
        return str(self.place(i))

    def place(self, i: int) -> Place:
        """The same in its parts."""
        shard, offset, _ = self._locate(i)
        name = self._shards[shard][0]
        try:
            with (self.data_dir / name).open("rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(
                    file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape"
                ).name
        except (OSError, tarfile.TarError):
            return Place(name, offset, "")
        folder, slash, file_name = member.rpartition("/")
        return Place(name, offset, folder + slash + file_name.partition(".")[0])

    def fault(self, i: int) -> str | None:
        """What has happened to the shard of picture i since the index was made; None: nothing."""
        name, size = self._shards[self._locate(i)[0]]
        try:
            _check_shard(self.data_dir / name, size, len(self._shards))
        except UserError as error:
            return str(error)
        return None

    def subset(self, indices: np.ndarray) -> IndexedShards:
        """The same for some of the pictures only: int64 [M] positions, kept in the given order."""
        return IndexedShards(
            self.data_dir,
            self.split,
            self._header,
            self._all_rows,
            self._selected(indices),
            self.index_dir,
            self.name,
        )

    def _selected(self, indices: np.ndarray) -> np.ndarray:
        """Positions in the whole split of these of ours."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or (
            len(indices) and (indices.min() < 0 or indices.max() >= len(self))
        ):
            raise IndexError(f"subset wants positions below {len(self)} in one dimension")
        return indices if self._selection is None else self._selection[indices]

    def __getstate__(self) -> tuple[Any, ...]:
        where = self.index_dir, self.name
        return self.data_dir, self.split, self._header, self._selection, *where

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        data_dir, split, header, selection, index_dir, name = state
        rows = map_rows(index_dir, split)
        self.__init__(data_dir, split, header, rows, selection, index_dir, name)  # type: ignore[misc]

    def _locate(self, i: int) -> tuple[int, int, int]:
        """(shard, offset, size) of picture i."""
        if not 0 <= i < len(self._rows):
            raise IndexError(f"picture {i} of {len(self._rows)}")
        shard, offset, size, _ = self._rows[i].item()
        return shard, offset, size

    def _map(self, shard: int) -> mmap.mmap:
        name, size = self._shards[shard]
        path = self.data_dir / name
        try:
            with path.open("rb") as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != size:  # mapped all the same, reading it could kill the process
                    raise UserError(_wrong_size(path, actual, size))
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise UserError(f"Cannot read shard {path}: {open_failure(error)}.") from error
        self._keep(shard, mapped)
        return mapped

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


def _read_header(data_dir: Path, index_dir: Path) -> dict[str, Any]:
    if not data_dir.is_dir():
        raise UserError(_not_a_folder(data_dir))
    path = index_dir / INDEX_JSON
    if not path.is_file():
        raise UserError(_not_shards(data_dir))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    return parse_header(content, path, anywhere=index_dir != data_dir)


def parse_header(content: bytes, path: Path | str, *, anywhere: bool = False) -> dict[str, Any]:
    """What is in an index.json.

    path: where it lies, for messages. anywhere: shards may lie in other folders.

    Raises UserError: it is damaged, of another version or of something else.
    """
    try:
        header = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). {_MAKE_AGAIN}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path} is not an index of {FORMAT}. {_MAKE_AGAIN}")
    if header.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {header.get('version')}, this program reads version "
            f"{VERSION}. {_MAKE_AGAIN}"
        )
    problem = _header_problem(header, anywhere)
    if problem:
        raise UserError(f"{path} is damaged ({problem}). {_MAKE_AGAIN}")
    return header


def _header_problem(header: Mapping[str, Any], anywhere: bool) -> str | None:
    """What is wrong with the structure of an index.json, None when nothing is.

    anywhere: shards may lie in other folders.
    """
    classes, splits = header.get("classes"), header.get("splits")
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        return "'classes' is not a list of names"
    if not isinstance(splits, dict):
        return "'splits' is missing"
    for name, entry in splits.items():
        try:
            sizes = [(str(s["name"]), int(s["bytes"]), int(s["samples"])) for s in entry["shards"]]
            samples, checksum = int(entry["samples"]), entry["checksum"]
            checksums = [s.get("checksum", "") for s in entry["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            return f"split {name!r}: {type(error).__name__} {error}"
        if not all(isinstance(text, str) for text in (checksum, *checksums)):
            return f"split {name!r}: 'checksum' is not text"
        if not anywhere and any("/" in shard for shard, _, _ in sizes):
            return f"split {name!r}: a shard lies in another folder"
        if sum(count for _, _, count in sizes) != samples:
            return f"split {name!r}: the shards' samples do not add up to {samples}"
    return None


def map_rows(index_dir: Path, split: str) -> np.ndarray:
    """The index of a split, memory-mapped; ValueError when it is not one."""
    rows = np.lib.format.open_memmap(index_dir / index_name(split), mode="r")
    if rows.dtype != INDEX_DTYPE or rows.ndim != 1:
        raise ValueError(f"{rows.ndim}-dimensional array of {rows.dtype}")
    return np.asarray(rows)  # numpy's memmap class makes every access slower


def read_rows(index_dir: Path, split: str, header: Mapping[str, Any]) -> np.ndarray:
    """The same, checked. Raises UserError: it cannot be read, is damaged, or not the header's."""
    path = index_dir / index_name(split)
    entry = header["splits"][split]
    try:
        rows = map_rows(index_dir, split)
    except OSError as error:
        raise UserError(
            f"Cannot read the index {path}: {error.strerror or error}. {_MAKE_AGAIN}"
        ) from error
    except (ValueError, EOFError) as error:
        raise UserError(f"The index {path} is damaged ({error}). {_MAKE_AGAIN}") from error
    if len(rows) != entry["samples"]:
        raise UserError(
            f"The index {path} has {len(rows)} samples, {INDEX_JSON} says {entry['samples']}: "
            f"the two belong to different sets of shards. {_MAKE_AGAIN}"
        )
    if rows_checksum(rows) != entry["checksum"]:
        raise UserError(
            f"The checksum of the index {path} is not the one in {INDEX_JSON}: it was changed, or "
            f"the two belong to different sets of shards. {_MAKE_AGAIN}"
        )
    sizes = np.array([s["bytes"] for s in entry["shards"]], dtype=np.uint64)
    if len(rows) == 0:
        raise UserError(f"The index {path} is empty. {_MAKE_AGAIN}")
    inside = rows["shard"].max() < len(sizes) and bool(
        (rows["offset"] + rows["size"] <= sizes[rows["shard"]]).all()
        and (rows["offset"] >= tarfile.BLOCKSIZE).all()
    )
    if not inside:
        raise UserError(f"The index {path} points outside the shards. {_MAKE_AGAIN}")
    if rows["label"].min() < -1 or rows["label"].max() >= max(len(header["classes"]), 0):
        raise UserError(f"The index {path} has labels that are no class. {_MAKE_AGAIN}")
    return rows


def _check_shards(data_dir: Path, entry: Mapping[str, Any]) -> None:
    """All shards of a split present, each with its recorded size: a stat a shard."""
    for shard in entry["shards"]:
        _check_shard(data_dir / shard["name"], shard["bytes"], len(entry["shards"]))


def _check_shard(path: Path, size: int, of: int) -> None:
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"Shard {path} is missing ({of} belong to this split). "
            "Copy it again from where the shards were made, or make them again."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read shard {path}: {error.strerror or error}.") from error
    if actual != size:
        raise UserError(_wrong_size(path, actual, size))


_MAKE_AGAIN = "Make the shards again with python -m moco_scale shard --overwrite …"


def _wrong_size(path: Path, actual: int, expected: int) -> str:
    how = "is truncated" if actual < expected else "was replaced"
    return (
        f"Shard {path} {how}: it has {actual} bytes, its index says {expected}. "
        "Copy it again from where the shards were made, or make them again."
    )


def shard_command(source: Path | str, out: Path | str) -> str:
    """The command line that makes shards of source in out."""
    source, out = shlex.quote(str(source)), shlex.quote(str(out))
    return f"python -m moco_scale shard --source {source} --out {out}"


def _beside(path: Path) -> Path:
    """Where shards of path could go: pictures.tar.gz -> pictures-shards, next to it."""
    named = path if path.name not in ("", "..") else path.resolve()
    stem = named.name.partition(".")[0] if path.is_file() else named.name
    return named.with_name(f"{stem}-shards")


def _not_a_folder(data_dir: Path) -> str:
    if data_dir.is_file():
        return (
            f"{data_dir} is a file; training reads a folder of shards. Make one with: "
            f"{shard_command(data_dir, _beside(data_dir))}"
        )
    return (
        f"There is no folder {data_dir}. It should hold shards, which are made from a folder or "
        f"tar of pictures with: {shard_command('PICTURES', data_dir)}"
    )


def _not_shards(data_dir: Path) -> str:
    if PARTIAL in data_dir.name:
        return f"{data_dir} was left by a run of python -m moco_scale shard that did not finish."
    names = sorted(entry.name for entry in data_dir.iterdir())
    shards = [d for d in names if (data_dir / d / INDEX_JSON).is_file()]
    if shards:
        return f"{data_dir} holds no {INDEX_JSON}; did you mean {data_dir / shards[0]}?"
    if not names:
        return (
            f"{data_dir} is empty. Make shards of a folder or tar of pictures with: "
            f"{shard_command('PICTURES', data_dir)}"
        )
    return (
        f"{data_dir} is not a folder of shards (it has no {INDEX_JSON}). If it holds pictures "
        f"(train/CLASS/* and val/CLASS/*, or CLASS/*), make shards of them with: "
        f"{shard_command(data_dir, _beside(data_dir))}"
    )
