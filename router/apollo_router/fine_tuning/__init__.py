"""OpenAI's fine-tuning API at /train/v1: what its clients call, on one live copy of the weights."""
