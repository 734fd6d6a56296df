"""A training looked at while it runs: sampled ranges, the last batches, what counts as failing."""
