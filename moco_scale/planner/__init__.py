"""Estimates of a run's memory, traffic and time, without a GPU."""
