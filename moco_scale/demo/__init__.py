"""Demo: a complete run, images included, in a few minutes on any machine."""
