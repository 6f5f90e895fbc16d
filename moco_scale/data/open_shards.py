"""From what the user calls a data set to the pictures in it."""

from __future__ import annotations

from pathlib import Path

from moco_scale.data import index
from moco_scale.data.mixed_shards import MixedShards, split_mixture
from moco_scale.data.scanned_index import open_scanned
from moco_scale.data.shard_list import ShardList, is_pattern, list_shards
from moco_scale.data.shard_set import Shards
from moco_scale.errors import UserError


def open_shards(spec: str | Path, split: str) -> Shards:
    """The pictures of one split of a data set, checked to be all there.

    spec, as `--data-dir` names it: a folder of shards made by `python -m moco_scale shard`; a
    folder of tars that were written elsewhere, or a pattern of such (see `list_shards`), which are
    indexed on first use; or several of these with weights, `A:0.7,B:0.3` (see `split_mixture`). Of
    several sets all must have a train split; other splits are those of the sets that have them.

    Raises UserError: there is no such data set or split, or something in it is missing or damaged.
    """
    named = split_mixture(str(spec))
    if len(named) == 1:
        return _open_one(named[0].spec, split)
    if split != "train":
        named = [part for part in named if _has_split(part.spec, split)] or named[:1]
    parts = [_open_one(part.spec, split) for part in named]
    weights = [part.weight for part in named if part.weight is not None]
    return MixedShards(str(spec), parts, weights or None)


def has_split(spec: str | Path, split: str) -> bool:
    """Whether spec is a finished data set that has this split, or has a set in it that does."""
    try:
        return any(_has_split(part.spec, split) for part in split_mixture(str(spec)))
    except UserError:
        return False


def _open_one(spec: str, split: str) -> Shards:
    tars = _without_index(spec)
    if tars is None:
        return index.IndexedShards.open(spec, split)
    return open_scanned(spec, tars, split)


def _has_split(spec: str, split: str) -> bool:
    tars = _without_index(spec)
    return index.has_split(spec, split) if tars is None else split in tars.splits


def _without_index(spec: str) -> ShardList | None:
    """Its tars when spec is a data set that came without our index."""
    folder = Path(spec)
    if not is_pattern(spec):
        unfinished = index.PARTIAL in folder.name
        if not folder.is_dir() or unfinished or (folder / index.INDEX_JSON).exists():
            return None
    return list_shards(spec)
