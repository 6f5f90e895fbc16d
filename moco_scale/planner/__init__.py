"""What a run will need: memory, traffic and time, worked out before any GPU is asked for."""
