"""From shards to batches: reader processes, skipped samples, decoded images kept."""
