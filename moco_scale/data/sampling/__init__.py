"""Which samples are read when: epochs, batches, mixtures, and numbers drawn by name."""
