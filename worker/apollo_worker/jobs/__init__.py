"""What is to be trained: queue, plans, tokens."""
