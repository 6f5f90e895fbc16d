"""From what the user calls a data set to the images in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moco_scale.data.kinds import (
    DataSet,
    IndexedFolder,
    RemoteFolder,
    RemoteTars,
    Several,
    Tars,
)
from moco_scale.data.remote.addresses import check_address, is_remote
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.shards.index_file import INDEX_JSON, PARTIAL
from moco_scale.data.shards.mixed_shards import split_mixture
from moco_scale.data.shards.protocols import Shards
from moco_scale.data.shards.recognise import look_into
from moco_scale.data.shards.remote_tars import is_remote_pattern
from moco_scale.data.shards.shard_list import ShardList, is_pattern, list_shards


def open_shards(source: str | Path | ShardSource, split: str) -> Shards:
    """Open the images of one split of a data set; see `data_set` and `DataSet.open`."""
    return data_set(source).open(split)


def data_set(source: str | Path | ShardSource) -> DataSet:
    """Tell which kind of data set a name stands for.

    source, as `--data-dir` names it: a folder that `python -m moco_scale shard` has made, or its
    address; a folder of tars that were written elsewhere, one such tar, or a pattern of them (see
    `list_shards`) or of their addresses (see `remote_tars`), which are indexed on first use; or
    several of these with weights, `A:0.7,B:0.3` (see `split_mixture`).

    Raises UserError: nothing can have such a name; tars that it names are compressed or missing.
    """
    source = source if isinstance(source, ShardSource) else ShardSource(str(source))
    named = split_mixture(source.spec)
    sets = [_one(replace(source, spec=part.spec)) for part in named]
    return sets[0] if len(sets) == 1 else Several(source, sets, [part.weight for part in named])


def _one(source: ShardSource) -> DataSet:
    check_address(source.spec)
    if is_remote(source.spec):
        return RemoteTars(source) if is_remote_pattern(source.spec) else RemoteFolder(source)
    tars = _without_index(source.spec)
    return IndexedFolder(source) if tars is None else Tars(source, tars)


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
        unfinished = PARTIAL in folder.name
        if not folder.is_dir() or unfinished or (folder / INDEX_JSON).exists():
            return None
    return list_shards(spec)
