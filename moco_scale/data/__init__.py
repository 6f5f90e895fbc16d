"""Data: shards, their indexes, and exact epochs of augmented views. Only this room knows tars."""
