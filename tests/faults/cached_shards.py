"""Shards behind a server, and what a cache holds of them."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from http_folder import FaultyFolder, served

from moco_scale.data.remote import fsspec_store
from moco_scale.data.remote.download import RemoteFile, RetryPolicy
from moco_scale.data.remote.shard_cache import ShardCache
from moco_scale.data.remote.store import Store

SIZE = 300_000
HURRIED = RetryPolicy(give_up=20.0, first_wait=0.002, longest_wait=0.01)
Serve = Callable[[Callable[[str, int], str]], FaultyFolder]


def content_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def shard(number: int, checksum: bool = True) -> RemoteFile:
    digest = hashlib.blake2b(content_of(number), digest_size=16).hexdigest()
    return RemoteFile(f"train-{number:06d}.tar", SIZE, digest if checksum else None)


@contextlib.contextmanager
def serving(origin: Path) -> Iterator[Serve]:
    """Servers of a folder of six shards, each with faults of its own."""
    origin.mkdir()
    for number in range(6):
        (origin / shard(number).name).write_bytes(content_of(number))
    with contextlib.ExitStack() as stack:
        yield lambda fault: stack.enter_context(served(origin, fault))


def at(server: FaultyFolder) -> Store:
    return fsspec_store.store_at(server.url)


def in_order(*faults: str) -> Callable[[str, int], str]:
    """These answers one after another, then good ones."""
    return lambda _, attempt: faults[attempt] if attempt < len(faults) else ""


def held(cache: ShardCache, store: Store, target: Path, number: int) -> mmap.mmap:
    with cache.hold(store, target, shard(number)) as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def there(target: Path) -> set[int]:
    names = (path.name for path in (target / "shards").glob("*.tar"))
    return {int(name[6:12]) for name in names}
