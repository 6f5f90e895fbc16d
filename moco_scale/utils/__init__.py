"""What every other room uses: errors, the log, files and locks, processes, devices."""
