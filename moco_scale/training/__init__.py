"""Pretraining: run, loop, inputs, monitor, run summary, bad images."""
