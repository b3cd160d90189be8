"""Logs: followed, read, stripped."""
