"""Remote shards: their index is fetched at once, each shard when it is needed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moco_scale.data.remote.download import RemoteFile, TooLarge, download_document
from moco_scale.data.remote.prefetch import RemotePart
from moco_scale.data.remote.shard_cache import SHARDS, ShardCache, gigabytes, shard_path, write_once
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.remote.store import Store
from moco_scale.data.sampling.order import Indices
from moco_scale.data.shards import index_file, indexed_shards
from moco_scale.untrusted.limits import DOCUMENT_SECONDS, INDEX_JSON, NPY_HEADER
from moco_scale.untrusted.shard_index import AnyIndex, ShardIndex, parse_index
from moco_scale.utils import locks
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import replacing
from moco_scale.utils.own_folders import without_links
from moco_scale.utils.text import printable
from moco_scale.utils.worker_process import closing

_ROWS_RATE = 1e5  # bytes a second at which rows have to arrive
_ATTEMPTS = 3  # to fetch an index that is whole and fits the rest


class RemoteShards(indexed_shards.IndexedShards):
    """Images of a remote split, read through a cache.

    `files` are the split's shards; `folder` is the set's in the cache, with the shards that are
    cached; `index_dir` holds the index.
    """

    def __init__(
        self,
        index_dir: Path,
        split: str,
        header: AnyIndex,
        rows: np.ndarray,
        selection: np.ndarray | None,
        files: Sequence[RemoteFile],
        name: str,
        folder: Path,
        store: Store,
        cache: ShardCache,
    ) -> None:
        names = [file.name for file in files]
        super().__init__(
            folder / SHARDS, split, header, rows, selection, index_dir, name, names=names
        )
        self._folder, self._store, self._cache, self._files = folder, store, cache, files

    def rest(self) -> None:
        self._maps.clear()

    def fault(self, i: int) -> str | None:
        """Report no fault: a mapped shard does not change, even if its name does."""
        return None

    def remedy(self, i: int) -> str:
        address = self._store.address(self._shards[self._locate(i)[0]][0])
        return f"replace {address}, and the index if there is one beside it, by ones without it"

    def checkable(self) -> list[str]:
        return []

    def remote_parts(self) -> list[RemotePart]:
        shard_of = self._rows["shard"].astype(np.uint32)
        return [RemotePart(0, shard_of, self._files, self._store, self._folder, self._cache)]

    def subset(self, indices: Indices) -> RemoteShards:
        selection = self._selected(indices)
        header, rows = self._header, self._all_rows
        origin = self._files, self.name, self._folder, self._store, self._cache
        return RemoteShards(self.index_dir, self.split, header, rows, selection, *origin)

    def __getstate__(self) -> tuple[Any, ...]:
        origin = self._files, self.name, self._folder, self._store, self._cache
        return self.index_dir, self.split, self._header, self._selection, *origin

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        index_dir, split, header, selection, *origin = state
        rows = index_file.map_rows(index_dir, split, header.splits[split].samples)
        self.__init__(index_dir, split, header, rows, selection, *origin)  # type: ignore[misc]

    def _path(self, shard: int) -> Path:
        return shard_path(self._folder, self._files[shard])

    def _map(self, shard: int) -> mmap.mmap:
        file, size = self._files[shard], self._shards[shard][1]
        held = self._cache.hold(
            self._store, self._folder, file, stopped=closing, let_go=self._maps.clear
        )
        with held:
            # The mapping keeps a descriptor of its own, and with it the lock.
            mapped = mmap.mmap(held.fileno(), size, prot=mmap.PROT_READ)
        self._keep(shard, mapped)
        return mapped


def open_remote(source: ShardSource, split: str) -> RemoteShards:
    """The images of a split at an address.

    Raises UserError: it cannot be reached, holds no such split or no index, the index is damaged,
    the cache cannot be written.
    """
    store, cache, name = source.store, source.cache, str(source)
    for attempt in range(1, _ATTEMPTS + 1):
        content = _fetch_index(store, cache)
        try:
            header = _parsed(content, store)
            if split not in header.splits:
                break
            folder = cache.home / _folder_name(name, content)
            rows = _rows(store, cache, folder, split, header, content)
            shards = header.splits[split].shards
            files = [RemoteFile(shard.name, shard.bytes, shard.checksum) for shard in shards]
            where = name, folder, store, cache
            return RemoteShards(folder, split, header, rows, None, files, *where)
        except _DamagedError as damage:
            if attempt == _ATTEMPTS:
                raise UserError(
                    f"{damage}; it was fetched {attempt} times. Copy the shards there again, all "
                    "of one making and with their index"
                ) from None
    known = ", ".join(sorted(header.splits)) or "none"
    raise UserError(f"{name} has no split {split!r}; it has: {known}.")


def remote_splits(source: ShardSource) -> Collection[str]:
    """Return the names of the splits at an address. Raises UserError: it cannot be read."""
    store = source.store
    content = _fetch_index(store, source.cache)
    try:
        return _parsed(content, store).splits
    except _DamagedError as damage:
        raise UserError(str(damage)) from None


class _DamagedError(Exception):
    """Fetched content that is not what it should be."""


def _parsed(content: bytes, store: Store) -> ShardIndex:
    where = store.address(index_file.INDEX_JSON)
    try:
        header = parse_index(content, where)
    except UserError as error:
        raise _DamagedError(str(error)) from None
    for entry in header.splits.values():
        for shard in entry.shards:
            # Nobody keeps shards under such a name, and servers keep other things there.
            if any(part.startswith(".") for part in shard.name.split("/")):
                raise _DamagedError(f"{where} names {printable(shard.name)!r}, a hidden file")
    return header


def _folder_name(name: str, index_content: bytes) -> str:
    """Name a set in the cache; another one when the remote set was made again."""
    key = hashlib.blake2b(name.encode() + index_content, digest_size=8).hexdigest()
    stem = re.sub(r"[^\w.-]+", "-", name.rstrip("/").rpartition("/")[2])[:40]
    return f"{stem}-{key}"


def _fetch_index(store: Store, cache: ShardCache) -> bytes:
    content = io.BytesIO()
    file = RemoteFile(index_file.INDEX_JSON, most=INDEX_JSON)
    download_document(store, file, content, cache.retry, DOCUMENT_SECONDS)
    return content.getvalue()


def _rows(
    store: Store, cache: ShardCache, folder: Path, split: str, header: ShardIndex, content: bytes
) -> np.ndarray:
    """Return the rows of the index, fetched by one process if they are not in the folder."""
    path = folder / index_file.index_name(split)
    with cache.explained():
        cache.make(folder)
        with open(folder / ".lock", "a", opener=without_links) as lock:
            locks.lock(lock)
            if path.exists():
                with contextlib.suppress(UserError):
                    return index_file.read_rows(folder, split, header)
            write_once(folder / index_file.INDEX_JSON, content)
            _fetch_rows(store, cache, path, header.splits[split].samples)
            try:
                return index_file.read_rows(folder, split, header)
            except UserError:
                path.unlink()
                raise _DamagedError(
                    f"{store.address(path.name)} is damaged, or not of the "
                    f"{index_file.INDEX_JSON} there"
                ) from None


def _fetch_rows(store: Store, cache: ShardCache, path: Path, samples: int) -> None:
    """Fetch the rows to a file; their size in index.json is not trusted."""
    most = samples * index_file.INDEX_DTYPE.itemsize + NPY_HEADER
    if most > cache.limit:
        raise UserError(
            f"{store.address(index_file.INDEX_JSON)} speaks of {samples:,} samples, whose index "
            f"alone has {gigabytes(most)}: more than --shard-cache-size {gigabytes(cache.limit)}"
        )
    wanted, seconds = RemoteFile(path.name, most=most), DOCUMENT_SECONDS + most / _ROWS_RATE
    try:
        with replacing(path, shared=True) as file:
            download_document(store, wanted, file, cache.retry, seconds)
    except TooLarge:
        raise _DamagedError(
            f"{store.address(path.name)} has more than the {samples:,} samples that "
            f"{index_file.INDEX_JSON} there says"
        ) from None
