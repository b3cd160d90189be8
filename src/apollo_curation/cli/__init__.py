"""Curation's commands."""
