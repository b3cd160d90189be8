"""Live weights to shards."""
