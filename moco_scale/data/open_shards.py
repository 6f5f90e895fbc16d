"""From what the user calls a data set to the pictures in it."""

from __future__ import annotations

from pathlib import Path

from moco_scale.data import index
from moco_scale.data.shard_set import Shards


def open_shards(spec: str | Path, split: str) -> Shards:
    """The pictures of one split of a data set, checked to be all there.

    spec: a folder of shards, as `--data-dir` names it.

    Raises UserError: there is no such data set or split, or something in it is missing or damaged.
    """
    return index.IndexedShards.open(spec, split)


def has_split(spec: str | Path, split: str) -> bool:
    """Whether spec is a finished data set that has this split."""
    return index.has_split(spec, split)
