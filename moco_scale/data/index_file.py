"""The index that is kept beside WebDataset shards: what is in its files, and reading them.

A folder of shards holds, for each split, ``train-000000.tar … `` and ``train-index.npy``, and once
for all splits ``index.json``. The tars are plain WebDataset files that any tool can stream; the
index is what exact epochs need on top of that: where each picture lies. (Shards of others that were
repaired may lie in sub-folders: their names are paths below the folder.)

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
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moco_scale.errors import UserError

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


def read_header(data_dir: Path, index_dir: Path) -> dict[str, Any]:
    """What is in the index.json of shards in data_dir; see `parse_header`.

    Raises UserError: data_dir is no folder of shards; the message says what it seems to be.
    """
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
        if not anywhere and any(map(_outside, (shard for shard, _, _ in sizes))):
            return f"split {name!r}: a shard lies outside the folder"
        if sum(count for _, _, count in sizes) != samples:
            return f"split {name!r}: the shards' samples do not add up to {samples}"
    return None


def _outside(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


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


def rows_by_shard(rows: np.ndarray, shards: int) -> list[np.ndarray]:
    """The rows of an index, which are in the order of its shards, for each of so many shards."""
    return np.split(rows, np.searchsorted(rows["shard"], np.arange(1, shards)))


_MAKE_AGAIN = "Make the shards again with python -m moco_scale shard --overwrite …"


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
            f"{data_dir} is a file, and no tar of samples (000.jpg, 000.cls, …). Make shards of "
            "the pictures in it, with the folders they lie in as classes: "
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
