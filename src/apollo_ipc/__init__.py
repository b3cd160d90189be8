"""What the router, the worker and the CLI share. Importable without vLLM and without torch."""
