"""Checkpoints: format, state of a run, saving in the background, output folder."""
