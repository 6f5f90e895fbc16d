"""Loading of batches: reader processes, skipped samples, cache of decoded images."""
