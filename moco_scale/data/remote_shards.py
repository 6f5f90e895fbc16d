"""Shards that lie elsewhere: their index is fetched at once, each of them when it is needed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moco_scale.data import index, index_file
from moco_scale.data.download import Patience, RemoteFile, download
from moco_scale.data.fetch_ahead import RemotePart
from moco_scale.data.order import Indices
from moco_scale.data.remote import Place
from moco_scale.data.shard_cache import SHARDS, ShardCache, shard_path, write_once
from moco_scale.data.shard_source import ShardSource
from moco_scale.data.workers import closing
from moco_scale.errors import UserError
from moco_scale.own_folders import without_links

_ATTEMPTS = 3  # to fetch an index that is whole and fits the rest


class RemoteShards(index.IndexedShards):
    """The pictures of a split that lie elsewhere, read through a cache.

    `folder` is the set's in the cache, with the shards that are here now; `index_dir` holds the
    index.
    """

    def __init__(
        self,
        index_dir: Path,
        split: str,
        header: Mapping[str, Any],
        rows: np.ndarray,
        selection: np.ndarray | None,
        name: str,
        folder: Path,
        place: Place,
        cache: ShardCache,
    ) -> None:
        super().__init__(folder / SHARDS, split, header, rows, selection, index_dir, name)
        self._folder, self._place, self._cache = folder, place, cache
        self._files = [
            RemoteFile(
                shard["name"],
                int(shard["bytes"]),
                shard.get("checksum"),
                shard.get("version", ""),
                shard.get("scan", ""),
            )
            for shard in header["splits"][split]["shards"]
        ]

    def rest(self) -> None:
        self._maps.clear()

    def fault(self, i: int) -> str | None:
        """A shard that was mapped stays what it was, whatever becomes of its name."""
        return None

    def remedy(self, i: int) -> str:
        address = self._place.address(self._shards[self._locate(i)[0]][0])
        return f"replace {address}, and the index if there is one beside it, by ones without it"

    def checkable(self) -> list[str]:
        return []

    def remote_parts(self) -> list[RemotePart]:
        shard_of = self._rows["shard"].astype(np.uint32)
        return [RemotePart(0, shard_of, self._files, self._place, self._folder, self._cache)]

    def subset(self, indices: Indices) -> RemoteShards:
        selection = self._selected(indices)
        header, rows = self._header, self._all_rows
        place = self.name, self._folder, self._place, self._cache
        return RemoteShards(self.index_dir, self.split, header, rows, selection, *place)

    def __getstate__(self) -> tuple[Any, ...]:
        place = self.name, self._folder, self._place, self._cache
        return self.index_dir, self.split, self._header, self._selection, *place

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        index_dir, split, header, selection, *place = state
        rows = index_file.map_rows(index_dir, split)
        self.__init__(index_dir, split, header, rows, selection, *place)  # type: ignore[misc]

    def _path(self, shard: int) -> Path:
        return shard_path(self._folder, self._files[shard])

    def _map(self, shard: int) -> mmap.mmap:
        file, size = self._files[shard], self._shards[shard][1]
        held = self._cache.hold(
            self._place, self._folder, file, stopped=closing, let_go=self._maps.clear
        )
        with held:
            # The mapping keeps a descriptor of its own, and with it the lock.
            mapped = mmap.mmap(held.fileno(), size, prot=mmap.PROT_READ)
        self._keep(shard, mapped)
        return mapped


def open_remote(source: ShardSource, split: str) -> RemoteShards:
    """The pictures of a split at an address.

    Raises UserError: it cannot be reached, holds no such split or no index, the index is damaged,
    the cache cannot be written.
    """
    place, cache, name = source.place, source.cache, str(source)
    for attempt in range(1, _ATTEMPTS + 1):
        content = _fetch(place, index_file.INDEX_JSON, cache.patience)
        try:
            header = _parsed(content, place)
            if split not in header["splits"]:
                break
            folder = cache.home / _folder_name(name, content)
            rows = _rows(place, cache, folder, split, header, content)
            return RemoteShards(folder, split, header, rows, None, name, folder, place, cache)
        except _DamagedError as damage:
            if attempt == _ATTEMPTS:
                raise UserError(
                    f"{damage}; it was fetched {attempt} times. Copy the shards there again, all "
                    "of one making and with their index"
                ) from None
    known = ", ".join(sorted(header["splits"])) or "none"
    raise UserError(f"{name} has no split {split!r}; it has: {known}.")


def has_remote_split(source: ShardSource, split: str) -> bool:
    """Whether there is such a split at an address. Raises UserError where nothing can be read."""
    place = source.place
    content = _fetch(place, index_file.INDEX_JSON, source.cache.patience)
    try:
        return split in _parsed(content, place)["splits"]
    except _DamagedError as damage:
        raise UserError(str(damage)) from None


class _DamagedError(Exception):
    """What was fetched is not what it should be."""


def _parsed(content: bytes, place: Place) -> dict[str, Any]:
    try:
        header = index_file.parse_header(content, place.address(index_file.INDEX_JSON))
    except UserError as error:
        raise _DamagedError(str(error)) from None
    for entry in header["splits"].values():
        for shard in entry["shards"]:
            if shard["name"].startswith("."):
                raise _DamagedError(
                    f"{place.address(index_file.INDEX_JSON)} names {shard['name']!r}"
                )
    return header


def _folder_name(name: str, index_content: bytes) -> str:
    """Of a set in the cache: another one when what lies at the address was made again."""
    key = hashlib.blake2b(name.encode() + index_content, digest_size=8).hexdigest()
    stem = re.sub(r"[^\w.-]+", "-", name.rstrip("/").rpartition("/")[2])[:40]
    return f"{stem}-{key}"


def _fetch(place: Place, name: str, patience: Patience) -> bytes:
    content = io.BytesIO()
    download(place, RemoteFile(name), content, patience)
    return content.getvalue()


def _rows(
    place: Place,
    cache: ShardCache,
    folder: Path,
    split: str,
    header: Mapping[str, Any],
    content: bytes,
) -> np.ndarray:
    """The rows of the index, which one process fetches unless they are in the folder."""
    path = folder / index_file.index_name(split)
    with cache.explained():
        cache.make(folder)
        with open(folder / ".lock", "a", opener=without_links) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                with contextlib.suppress(UserError):
                    return index_file.read_rows(folder, split, header)
            write_once(folder / index_file.INDEX_JSON, content)
            write_once(path, _fetch(place, path.name, cache.patience))
            try:
                return index_file.read_rows(folder, split, header)
            except UserError:
                path.unlink()
                raise _DamagedError(
                    f"{place.address(path.name)} is damaged, or not of the "
                    f"{index_file.INDEX_JSON} there"
                ) from None
