"""Moments: what in a conversation is worth learning from."""
