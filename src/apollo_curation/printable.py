"""Text from outside, shown to a person: it must not move a cursor or turn the direction of what follows."""

from __future__ import annotations

import unicodedata


def printable(text: object, limit: int | None = None) -> str:
    """Control characters and marks of direction as `\\u001b`; what is longer than `limit` is cut, with a word
    of how much."""
    whole = str(text)
    shown = "".join(map(_shown, whole if limit is None else whole[:limit]))
    left = 0 if limit is None else len(whole) - limit
    return f"{shown} … ({left} more characters)" if left > 0 else shown


def _shown(char: str) -> str:
    # Zero-width joiners belong to words of many scripts.
    if char in "\n\t\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"):
        return char
    return "" if char == "\r" else f"\\u{ord(char):04x}"
