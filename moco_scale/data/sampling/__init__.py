"""Sampling: epochs, batches, mixtures, and random numbers drawn by name."""
