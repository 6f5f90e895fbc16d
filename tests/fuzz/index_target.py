"""Fuzz target: index.json and the rows beside it, of a folder and as they come from an address."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np

from moco_scale.data.shards.index_file import (
    INDEX_JSON,
    has_split,
    index_name,
    read_header,
    read_rows,
    read_scanned_header,
    split_entry,
)
from moco_scale.untrusted.shard_index import FORMAT, INDEX_DTYPE
from moco_scale.utils.errors import UserError

_BETWEEN = b"\n--rows--\n"
_SIZES = [("train-000000.tar", 10240, 2), ("a/train-000001.tar", 5000, 1)]


def SEEDS() -> list[bytes]:
    """Return index.json and rows, of labelled and of unlabelled samples, one after the other."""
    seeds = []
    for classes, label in ((["ash", "birch"], 1), ([], -1)):
        rows = np.array([(0, 512, 9, label), (0, 2048, 9, label), (1, 512, 99, -1)], INDEX_DTYPE)
        entry = split_entry("train", rows, _SIZES, ["0" * 32, "1" * 32])
        entry["shards"][0]["version"] = "0123abc"
        header = {"format": FORMAT, "version": 1, "classes": classes, "splits": {"train": entry}}
        content = io.BytesIO()
        np.save(content, rows)
        seeds.append(
            json.dumps(header | {"made": {"by": "x"}}).encode() + _BETWEEN + content.getvalue()
        )
    return seeds


def run(data: bytes, folder: Path) -> None:
    """Read a folder of shards as training, checking and an index of scanned tars do."""
    index, _, rows = data.partition(_BETWEEN)
    (folder / INDEX_JSON).write_bytes(index)
    (folder / index_name("train")).write_bytes(rows)
    has_split(folder, "train")
    with contextlib.suppress(UserError):
        read_scanned_header(folder, {"train": [name for name, *_ in _SIZES]})
    with contextlib.suppress(UserError):
        header = read_header(folder)
        for split in header.splits:
            with contextlib.suppress(UserError):
                found = read_rows(folder, split, header)
                ends = found["offset"].astype(object) + found["size"].astype(object)
                shards = header.splits[split].shards
                assert all(e <= shards[s].bytes for e, s in zip(ends, found["shard"], strict=True))
        for name in [shard.name for entry in header.splits.values() for shard in entry.shards]:
            assert (folder / name).absolute().is_relative_to(folder) and ".." not in name.split("/")
