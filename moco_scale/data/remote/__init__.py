"""Remote shards: stores, downloads, the cache and its prefetch."""
