"""What the two processes of the worker say to each other."""
