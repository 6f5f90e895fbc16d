"""Checkpoints: their format, a run's state, writing beside the loop, the output folder."""
