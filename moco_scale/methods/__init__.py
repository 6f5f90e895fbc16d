"""The papers: encoder pair, key queue, InfoNCE, ShuffleBN."""
