"""How a model is wrapped, stepped and saved; nothing outside knows DeepSpeed or DDP."""
