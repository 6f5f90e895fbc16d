"""Settings: their schema and flags, recipes, and DeepSpeed files."""
