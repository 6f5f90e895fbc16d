"""Shards, their index, and exact epochs of augmented views. Nothing else knows what a tar is."""
