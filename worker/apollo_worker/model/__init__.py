"""vLLM's memory as a transformers model."""
