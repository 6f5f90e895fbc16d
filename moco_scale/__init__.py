"""Momentum-contrast pretraining that gives the same run on any number of GPUs."""

__version__ = "0.1.0"
