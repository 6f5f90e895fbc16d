"""Shards that lie elsewhere: stores, downloads, the cache and its prefetch."""
