"""Whether an answer says what was asked for: by words, as every table of this project judges it."""

from __future__ import annotations

import re


def is_in(key: str, answer: str) -> bool:
    """Whether one of `key`'s alternatives ("seven|7") stands in the answer as words, whatever its case."""
    words = "|".join(re.escape(one) for one in key.split("|"))
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", answer, re.IGNORECASE) is not None
