"""Shards, their index, and exact epochs of augmented views. Only this package knows what a tar is."""
