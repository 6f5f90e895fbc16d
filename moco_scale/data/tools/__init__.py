"""What makes, checks and mends shards, and the sources they are made of."""
