"""The loop of pretraining: inputs, monitor, banner, skipped images."""
