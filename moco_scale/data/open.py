"""From what the user calls a data set to the images in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moco_scale.data.remote.addresses import check_address, is_remote, names_remote
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.shards import index_file, indexed_shards
from moco_scale.data.shards.mixed_shards import MixedShards, split_mixture
from moco_scale.data.shards.protocols import Shards
from moco_scale.data.shards.recognise import look_into
from moco_scale.data.shards.remote_shards import has_remote_split, open_remote
from moco_scale.data.shards.remote_tars import is_remote_pattern, open_remote_tars, remote_tars
from moco_scale.data.shards.scanned_index import open_scanned
from moco_scale.data.shards.shard_list import ShardList, is_pattern, list_shards
from moco_scale.utils.errors import UserError
from moco_scale.utils.progress import heard_by


def open_shards(
    source: str | Path | ShardSource, split: str, gets_on: Callable[[], None] | None = None
) -> Shards:
    """The images of one split of a data set, checked to be all there.

    source, as `--data-dir` names it: a folder that `python -m moco_scale shard` has made, or its
    address; a folder of tars that were written elsewhere, one such tar, or a pattern of them (see
    `list_shards`) or of their addresses (see `remote_tars`), which are indexed on first use; or
    several of these with weights, `A:0.7,B:0.3` (see `split_mixture`). Of several sets all must
    have a train split; other splits are those of the sets that have them. gets_on: called whenever
    an index that takes long to make has got on, from any thread.

    Raises UserError: there is no such data set or split, or something in it is missing or damaged.
    """
    with heard_by(gets_on):
        return _open(_source(source), split)


def _open(source: ShardSource, split: str) -> Shards:
    named = split_mixture(source.spec)
    each = [replace(source, spec=part.spec) for part in named]
    if len(named) == 1:
        return _open_one(each[0], split)
    if split != "train":
        having = [i for i, part in enumerate(each) if _has_split(part, split)] or [0]
        named, each = [named[i] for i in having], [each[i] for i in having]
    weights = [part.weight for part in named if part.weight is not None]
    return MixedShards(str(source), [_open_one(part, split) for part in each], weights or None)


def has_split(source: str | Path | ShardSource, split: str) -> bool:
    """Whether source is a finished data set that has this split, or has a set in it that does.

    Raises UserError: an address at which nothing can be read.
    """
    source = _source(source)
    try:
        named = split_mixture(source.spec)
    except UserError:
        return False
    return any(_has_split(replace(source, spec=part.spec), split) for part in named)


def local_splits(spec: str) -> list[str]:
    """The splits of a data set on this machine, train first.

    Raises UserError: there is no such data set, or something of it is missing or damaged.
    """
    found: list[str] = []
    for part in split_mixture(spec):
        tars = _without_index(part.spec)
        folder = Path(part.spec)
        found += index_file.read_header(folder).splits if tars is None else tars.splits
    return sorted(set(found), key=lambda split: (split != "train", split))


def _source(source: str | Path | ShardSource) -> ShardSource:
    return source if isinstance(source, ShardSource) else ShardSource(str(source))


def _open_one(source: ShardSource, split: str) -> Shards:
    if names_remote(source.spec):
        check_address(source.spec)
    if is_remote(source.spec):
        pattern = is_remote_pattern(source.spec)
        return open_remote_tars(source, split) if pattern else open_remote(source, split)
    tars = _without_index(source.spec)
    if tars is None:
        return indexed_shards.IndexedShards.open(source.spec, split)
    return open_scanned(source.spec, tars, split)


def _has_split(source: ShardSource, split: str) -> bool:
    if is_remote(source.spec):
        if is_remote_pattern(source.spec):
            return split in remote_tars(source).splits
        return has_remote_split(source, split)
    try:
        tars = _without_index(source.spec)
    except UserError:
        return False
    return index_file.has_split(source.spec, split) if tars is None else split in tars.splits


def _without_index(spec: str) -> ShardList | None:
    """Its tars when spec is a data set that came without our index."""
    folder = Path(spec)
    if folder.is_file():
        seems = look_into(folder)
        # Folders may be the classes of images without labels of their own: those make shards.
        samples = seems.images and (seems.labelled or not seems.folders)
        samples = samples or seems.unusable
        return list_shards(spec) if samples else None
    if not is_pattern(spec):
        unfinished = index_file.PARTIAL in folder.name
        if not folder.is_dir() or unfinished or (folder / index_file.INDEX_JSON).exists():
            return None
    return list_shards(spec)
