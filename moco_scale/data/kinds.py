"""Kinds of data set that `--data-dir` can name, each of which can open itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path

from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.shards import index_file
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.shards.mixed_shards import MixedShards
from moco_scale.data.shards.protocols import Shards
from moco_scale.data.shards.remote_shards import open_remote, remote_splits
from moco_scale.data.shards.remote_tars import index_remote_tars, open_remote_tars, remote_tars
from moco_scale.data.shards.scanned_index import open_scanned
from moco_scale.data.shards.shard_list import ShardList


class DataSet(ABC):
    """Data set that is named and not yet open."""

    def __init__(self, source: ShardSource) -> None:
        self.source = source

    @property
    @abstractmethod
    def splits(self) -> Collection[str]:
        """Names of the splits that it has. Raises UserError: it cannot be read."""

    @abstractmethod
    def open(self, split: str) -> Shards:
        """Open the images of a split, checked to be all there.

        Raises UserError: there is no such data set or split, or something in it is missing or
        damaged.
        """

    def index(self) -> None:
        """Make the index of tars that have none, however long that takes. Raises as `open`."""
        self.open(next(iter(self.splits), "train"))

    @property
    def exists(self) -> bool:
        """False where a folder is no data set."""
        return True


class IndexedFolder(DataSet):
    """Folder that ``python -m moco_scale shard`` has made, or one that is no data set."""

    @property
    def splits(self) -> Collection[str]:
        return index_file.read_header(Path(self.source.spec)).splits

    def open(self, split: str) -> Shards:
        return IndexedShards.open(self.source.spec, split)

    @property
    def exists(self) -> bool:
        folder = Path(self.source.spec)
        return index_file.PARTIAL in folder.name or (folder / index_file.INDEX_JSON).is_file()


class Tars(DataSet):
    """Tars that were written elsewhere, on this machine: indexed on first use."""

    def __init__(self, source: ShardSource, tars: ShardList) -> None:
        super().__init__(source)
        self._tars = tars

    @property
    def splits(self) -> Collection[str]:
        return self._tars.splits

    def open(self, split: str) -> Shards:
        return open_scanned(self.source.spec, self._tars, split)


class RemoteFolder(DataSet):
    """Address of a folder with its index."""

    @property
    def splits(self) -> Collection[str]:
        return remote_splits(self.source)

    def open(self, split: str) -> Shards:
        return open_remote(self.source, split)


class RemoteTars(DataSet):
    """Pattern of addresses of tars without an index."""

    @property
    def splits(self) -> Collection[str]:
        return remote_tars(self.source).splits

    def open(self, split: str) -> Shards:
        return open_remote_tars(self.source, split)

    def index(self) -> None:
        index_remote_tars(self.source)


class Several(DataSet):
    """Mixture of sets, with weights or without."""

    def __init__(
        self, source: ShardSource, sets: Sequence[DataSet], weights: Sequence[float | None]
    ) -> None:
        super().__init__(source)
        self._sets, self._weights = sets, weights

    @property
    def splits(self) -> Collection[str]:
        return {split for each in self._sets for split in each.splits}

    def open(self, split: str) -> Shards:
        """Open the split of those sets that have it; all must have a train split."""
        chosen = list(zip(self._sets, self._weights, strict=True))
        if split != "train":
            chosen = [(each, w) for each, w in chosen if split in each.splits] or chosen[:1]
        weights = [weight for _, weight in chosen if weight is not None]
        parts = [each.open(split) for each, _ in chosen]
        return MixedShards(str(self.source), parts, weights or None)

    def index(self) -> None:
        for each in self._sets:
            each.index()
