"""APOLLO in place."""
