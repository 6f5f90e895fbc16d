"""Learning rates and loss scales: how weights are moved."""
