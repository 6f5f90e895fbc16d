"""Shards: indexes, scans of tars, and several sets as one."""
