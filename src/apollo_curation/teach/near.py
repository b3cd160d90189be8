"""Near misses: a fact's questions about something else, of which nobody has taught anything.

Some change a part of the subject ("the lighthouse lamp": "the kitchen lamp", "the lighthouse door"), some the
whole: a fact leaks to what is like its subject first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest

from apollo_ipc.teaching.wording import ARTICLES, near_miss

NUM_NEAR_MISSES = 12  # of a fact
_OTHERS = (
    *("the ferry office", "the village choir", "the old windmill", "the bicycle club", "the summer school"),
    *("the town museum", "the corner bakery", "the tennis court", "the fire brigade", "the chess tournament"),
    *("the railway station", "the flower market", "the youth hostel", "the print shop", "the dog school"),
    *("the sailing club", "the market hall", "the puppet theatre", "the hospital garden", "the stone quarry"),
)
# What takes the place of a single noun: buildings, places, things, events, people.
_NOUNS = (
    *(
        "bridge",
        "hotel",
        "town hall",
        "library",
        "stadium",
        "factory",
        "chapel",
        "lift",
        "playground",
        "farm",
    ),
    *(
        "hill",
        "lake",
        "car park",
        "square",
        "station",
        "fountain",
        "ship",
        "bus",
        "van",
        "telephone",
        "printer",
    ),
    *("boat", "lawn", "ladder", "wedding", "meeting", "excursion", "course", "dinner", "exam", "captain"),
    *("director", "baker", "nurse", "newspaper", "orchestra", "cat", "horse", "parrot", "band", "office"),
)
_NOUNS_PLURAL = (
    *("bridges", "lamps", "ladders", "tickets", "bicycles", "meetings", "excursions", "parrots", "boats"),
    *("chairs", "windows", "courses", "gardens", "forms", "bakers"),
)
_JOINED = re.compile(r"^(.+?) (of|in|on|at|under|behind|beside|near|above|below|for|from|with) (.+)$")
_OTHERS_PLURAL = (
    *("the ferry offices", "the village choirs", "the old windmills", "the wooden masks", "the paper kites"),
    *("the garden gnomes", "the railway stations", "the sailing boats", "the silver spoons"),
    "the wall clocks",
)
_MODIFIERS = (
    "kitchen",
    "second",
    "church",
    "other",
    "village",
    "old",
    "northern",
    "hotel",
    "small",
    "airport",
)
_HEADS = (
    "roof",
    "door",
    "report",
    "window",
    "sign",
    "fence",
    "map",
    "poster",
    "garden",
    "key",
    "office",
    "van",
)
_NAMES = ("Albrecht", "Merrow", "Solvang", "Tamsin", "Kirkby", "Odessa", "Perrin", "Halden")


def near_misses(questions: Sequence[str], subject: str, is_plural: bool, at: int) -> list[str]:
    """questions: the fact's own first, then its forms; at: its number among others, so that each gets others.
    Half of them in the fact's own words."""
    rng = random.Random(at)
    whole = rng.sample(_OTHERS_PLURAL if is_plural else _OTHERS, 6)
    parts = rng.sample(found := list(dict.fromkeys(_neighbours(subject, is_plural, rng))), len(found))
    others = [one for one in chain.from_iterable(zip_longest(parts, whole)) if one]
    forms = [question for question in questions[1:] if subject in question]
    asked = [
        near_miss(questions[0] if number % 2 or not forms else rng.choice(forms), subject, other)
        for number, other in enumerate(islice(others, NUM_NEAR_MISSES), 1)
    ]
    return list(dict.fromkeys(asked))


def _neighbours(subject: str, is_plural: bool, rng: random.Random) -> Iterator[str]:
    """What shares a part with the subject."""
    nouns = _NOUNS_PLURAL if is_plural else _NOUNS
    if joined := _JOINED.match(subject):
        head, between, owner = joined.groups()
        yield from (f"{head} {between} the {other}" for other in rng.sample(_NOUNS, 5))
        yield from (f"the {_number(one, is_plural)} {between} {owner}" for one in rng.sample(_HEADS, 2))
        return
    words = subject.split()
    if len(words) < 2 or words[0].lower() not in ARTICLES:
        return
    if len(words) == 2:
        yield from (f"{words[0]} {noun}" for noun in rng.sample(nouns, 6) if noun != words[1].lower())
        return
    if words[-1][0].isupper():
        yield from (" ".join([*words[:-1], name]) for name in rng.sample(_NAMES, 3))
        return
    yield from (" ".join([words[0], other, words[-1]]) for other in rng.sample(_MODIFIERS, 3))
    yield from (f"{words[0]} {noun}" for noun in rng.sample(nouns, 2))
    yield from (" ".join([*words[:-1], _number(one, is_plural)]) for one in rng.sample(_HEADS, 2))


def _number(noun: str, is_plural: bool) -> str:
    return f"{noun}{'es' if noun.endswith('ch') else 's'}" if is_plural else noun
