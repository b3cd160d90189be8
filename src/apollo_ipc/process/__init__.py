"""Processes, signals and what they say."""
