"""Observation of a run: phases, heartbeats, watchdog, stragglers, finite values, loggers."""
