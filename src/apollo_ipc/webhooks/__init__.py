"""Telling other servers what happened here: a durable outbox, and what sends it."""
