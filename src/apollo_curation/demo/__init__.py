"""The demonstration of a night."""
