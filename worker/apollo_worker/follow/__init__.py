"""Another machine's checkpoint, followed: each version that it commits goes into this vLLM's live weights."""
