"""Shards: their index, what their tars hold, several sets as one."""
