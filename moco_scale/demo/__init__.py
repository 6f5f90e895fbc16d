"""A complete run, pictures included, in a few minutes on any machine."""
