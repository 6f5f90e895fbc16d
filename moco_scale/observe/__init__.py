"""What is noticed of a run: phases, heartbeats, stragglers, numbers, and where it is logged."""
