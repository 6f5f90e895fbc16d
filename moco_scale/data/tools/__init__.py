"""Tools that make, check and repair shards, and their sources."""
