"""Data set as the user names it, with the settings for remote ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moco_scale.data.remote.addresses import shown
from moco_scale.data.remote.download import RetryPolicy
from moco_scale.data.remote.fsspec_store import store_at
from moco_scale.data.remote.shard_cache import GB, ShardCache, cache_home
from moco_scale.data.remote.store import Store

CACHE_GB = 32.0
GIVE_UP_SECONDS = 600.0


@dataclass(frozen=True)
class ShardSource:
    """Source that `open_shards` opens.

    Args:
        spec: a folder, or an address.
        cache_dir: for fetched shards; "" means a folder of the user's cache.
        cache_size: upper bound of that folder in GB.
        give_up: seconds without new bytes after which a shard is given up.
    """

    spec: str
    cache_dir: str = ""
    cache_size: float = CACHE_GB
    give_up: float = GIVE_UP_SECONDS

    def __str__(self) -> str:
        return shown(self.spec)

    @property
    def cache(self) -> ShardCache:
        root = Path(self.cache_dir).expanduser() if self.cache_dir else cache_home() / "shards"
        return ShardCache(root.absolute(), round(self.cache_size * GB), RetryPolicy(self.give_up))

    @property
    def store(self) -> Store:
        """Return the store of an address. Raises UserError."""
        return store_at(self.spec)
