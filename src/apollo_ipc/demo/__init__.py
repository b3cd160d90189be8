"""The demonstration: a small model made from nothing, served, taught, and asked again."""
