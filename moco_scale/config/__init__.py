"""Configuration: schema and flags, recipes, and DeepSpeed files."""
