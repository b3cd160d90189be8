"""What a process says to the person who started it."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """A remark beside the result, on standard error."""
    print(f"apollo-ipc: {text}", file=sys.stderr, flush=True)
