"""Losses to where people keep their curves: a process for each library, which nothing waits for."""
