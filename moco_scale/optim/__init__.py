"""Learning-rate schedules and loss scales."""
