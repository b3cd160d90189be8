"""All that runs inside vLLM's processes, and nothing else."""
