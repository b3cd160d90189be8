"""What is to be taught, as it is sent and stored: facts, teach jobs, and lessons that were learned."""
