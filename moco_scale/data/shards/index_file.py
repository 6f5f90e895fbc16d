"""Index of WebDataset shards: the format of its files, and reading them.

A folder of shards holds, for each split, ``train-000000.tar … `` and ``train-index.npy``, and once
for all splits ``index.json``. The tars are plain WebDataset files that any tool can stream; exact
epochs also need the index, the place of each image. (Repaired shards of others may lie in
sub-folders: their names are paths below the folder.)

``index.json``::

    {"format": "moco_scale shards", "version": 1,
     "classes": ["n01440764", …],            # [] when the images have no labels "splits": {"train":
     {"samples": 1281167,
                          "index": "train-index.npy", "checksum": "…",   # BLAKE2b-128 of the rows'
                          bytes "shards": [{"name": "train-000000.tar", "bytes": …, "samples": …,
                                      "checksum": "…"}, …]}},  # of the tar; may be missing
     "made": {…}}                            # how: source, seed, re-encoding, skipped images

``train-index.npy`` is one record of ``INDEX_DTYPE`` an image, in shard order. It is memory-mapped,
so all processes of a node share one copy of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moco_scale.untrusted.documents import read_bounded, without_waiting
from moco_scale.untrusted.limits import INDEX_JSON as INDEX_BYTES
from moco_scale.untrusted.limits import NPY_HEADER
from moco_scale.untrusted.shard_index import (
    FORMAT as FORMAT,
)
from moco_scale.untrusted.shard_index import (
    INDEX_DTYPE as INDEX_DTYPE,
)
from moco_scale.untrusted.shard_index import (
    VERSION as VERSION,
)
from moco_scale.untrusted.shard_index import (
    AnyIndex,
    ScannedIndex,
    ShardIndex,
    parse_index,
    parse_scanned_index,
    require_names,
    rows_problem,
)
from moco_scale.utils.errors import UserError, open_failure
from moco_scale.utils.text import printable

INDEX_JSON = "index.json"
PARTIAL = ".partial-"  # what stands between a folder's name and a suffix while it is being written


def index_name(split: str) -> str:
    """Name the file of a split's rows."""
    return f"{split}-index.npy"


def rows_checksum(rows: np.ndarray) -> str:
    """Compute the hex BLAKE2b-128 of an array of INDEX_DTYPE."""
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
    """Tell whether data_dir is a finished folder of shards with this split."""
    try:
        return split in _read(Path(data_dir) / INDEX_JSON).splits
    except UserError:
        return False


def read_header(data_dir: Path) -> ShardIndex:
    """Read the index.json of a folder of shards.

    Raises:
        UserError: data_dir is no folder of shards (the message has what it seems to be), or its
            index is damaged, of another version or of something else.
    """
    if not data_dir.is_dir():
        raise UserError(_not_a_folder(data_dir))
    path = data_dir / INDEX_JSON
    if not path.is_file():
        raise UserError(_not_shards(data_dir))
    return _read(path)


def _read(path: Path) -> ShardIndex:
    with _explained(path):
        return parse_index(read_bounded(path, INDEX_BYTES, "The index"), str(path))


def read_scanned_header(folder: Path, splits: dict[str, list[str]]) -> ScannedIndex:
    """Read the index.json of tars that were scanned here.

    Args:
        folder: of the index.
        splits: names of these tars, in their order.

    Raises:
        UserError: It is missing, damaged, or of other tars.
    """
    path = folder / INDEX_JSON
    with _explained(path):
        index = parse_scanned_index(read_bounded(path, INDEX_BYTES, "The index"), str(path))
        require_names(index, splits, str(path))
    return index


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot read {path}: {open_failure(error)}.") from error
    except ValueError as error:  # a zero byte in the path
        raise UserError(f"Cannot read {printable(path)}: {error}.") from error
    except UserError as error:
        raise UserError(f"{error}. {_MAKE_AGAIN}") from None


def map_rows(index_dir: Path, split: str, samples: int) -> np.ndarray:
    """Memory-map the index of a split, INDEX_DTYPE [samples].

    Raises:
        ValueError: It is no index; the text has the reason.
        OSError: It cannot be read.
    """
    path = index_dir / index_name(split)
    with open(path, "rb", opener=without_waiting) as file:
        start = _header_bytes(file.read(NPY_HEADER), samples)
        size, wanted = os.fstat(file.fileno()).st_size, start + samples * INDEX_DTYPE.itemsize
    if size != wanted:
        raise ValueError(f"it has {size} bytes instead of {wanted}")
    rows = np.memmap(path, INDEX_DTYPE, "r", start, (samples,))
    return np.asarray(rows)  # numpy's memmap class makes every access slower


# As np.save writes it: nothing else is, so nothing else has to be understood.
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)\{'descr': "
    + re.escape(repr(INDEX_DTYPE.descr).encode())
    + rb", 'fortran_order': False, 'shape': \((?P<samples>[0-9]{1,13}),\), \} *\n",
    re.DOTALL,
)  # fmt: skip


def _header_bytes(beginning: bytes, samples: int) -> int:
    """Return the start of the rows. Raises ValueError: these are not the expected rows."""
    found = _NPY_HEADER.match(beginning)
    if found is None or found.end() != 10 + int.from_bytes(found["length"], "little"):
        raise ValueError("it does not begin as an index does")
    if int(found["samples"]) != samples:
        raise ValueError(
            f"has {int(found['samples'])} samples, {INDEX_JSON} says {samples}: the two belong to "
            "different sets of shards"
        )
    return found.end()


def read_rows(index_dir: Path, split: str, header: AnyIndex) -> np.ndarray:
    """Map and check the rows. Raises UserError: unreadable, damaged, or not the header's."""
    path = index_dir / index_name(split)
    entry = header.splits[split]
    if entry.samples == 0:
        raise UserError(f"The index {path} is empty. {_MAKE_AGAIN}")
    try:
        rows = map_rows(index_dir, split, entry.samples)
    except OSError as error:
        remedy = f" {_MAKE_AGAIN}" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"Cannot read the index {path}: {open_failure(error)}.{remedy}") from error
    except ValueError as error:
        raise UserError(f"The index {path} is damaged ({error}). {_MAKE_AGAIN}") from error
    if rows_checksum(rows) != entry.checksum:
        raise UserError(
            f"The checksum of the index {path} is not the one in {INDEX_JSON}: it was changed, or "
            f"the two belong to different sets of shards. {_MAKE_AGAIN}"
        )
    problem = rows_problem(rows, entry, len(header.classes))
    if problem is not None:
        raise UserError(f"The index {path} {problem}. {_MAKE_AGAIN}")
    return rows


def rows_by_shard(rows: np.ndarray, shards: int) -> list[np.ndarray]:
    """Split the rows of an index, which are in shard order, by shard."""
    return np.split(rows, np.searchsorted(rows["shard"], np.arange(1, shards)))


_MAKE_AGAIN = "Make the shards again with python -m moco_scale shard --overwrite …"


def shard_command(source: Path | str, out: Path | str) -> str:
    """Return the command line that makes shards of source in out."""
    source, out = shlex.quote(str(source)), shlex.quote(str(out))
    return f"python -m moco_scale shard --source {source} --out {out}"


def _beside(path: Path) -> Path:
    """Propose a folder for shards of path: images.tar.gz -> images-shards, next to it."""
    named = path if path.name not in ("", "..") else path.resolve()
    stem = named.name.partition(".")[0] if path.is_file() else named.name
    return named.parent / f"{stem}-shards"


def _not_a_folder(data_dir: Path) -> str:
    if data_dir.is_file():
        return (
            f"{data_dir} is a file, and no tar of samples (000.jpg, 000.cls, …). Make shards of "
            "the images in it, with the folders they lie in as classes: "
            f"{shard_command(data_dir, _beside(data_dir))}"
        )
    return (
        f"There is no folder {data_dir}. It should hold shards, which are made from a folder or "
        f"tar of images with: {shard_command('IMAGES', data_dir)}"
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
            f"{data_dir} is empty. Make shards of a folder or tar of images with: "
            f"{shard_command('IMAGES', data_dir)}"
        )
    return (
        f"{data_dir} is not a folder of shards (it has no {INDEX_JSON}). If it holds images "
        f"(train/CLASS/* and val/CLASS/*, or CLASS/*), make shards of them with: "
        f"{shard_command(data_dir, _beside(data_dir))}"
    )
