"""Utilities of all other rooms: errors, log, files and locks, processes, devices."""
