"""The process that trains; loop.py is the one file to read."""
