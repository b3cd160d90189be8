"""Texts that say nearly the same: Jaccard similarity of their word triples, exactly."""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable

import msgspec

from apollo_curation.moments.moments import Moment
from apollo_ipc.wire.requests import Message

SHINGLE_WORDS = 3

_WORD = re.compile(r"\w+")

Shingles = frozenset[str]


class NearDuplicates:
    """threshold: the similarity (0 to 1) from which two are one; 0 finds none, 1 only equal word triples.

    Looks at the decision alone: the last message of the context, and the answer. Two moments of one
    conversation share what came before. sample: moments alike to those that will come, by which is known what
    many of them share; it changes nothing but how fast it is.
    """

    def __init__(self, threshold: float, sample: Iterable[Moment] = ()):
        self._threshold = threshold
        self._frequency = Counter(part for one in sample if one.teaches for part in shingles(one))
        self._known: dict[str, Shingles] = {}
        self._by_shingle: dict[str, list[str]] = {}  # of those in `_prefix`

    def find(self, moment: Moment) -> str | None:
        """The id of the added moment that is most similar, None where none is similar enough."""
        if not self._threshold:
            return None
        own = shingles(moment)
        near = {key for shingle in self._prefix(own) for key in self._by_shingle.get(shingle, ())}
        found = [(similarity(own, self._known[key]), key) for key in near]
        return min(
            (one for one in found if one[0] >= self._threshold),
            key=lambda one: (-one[0], one[1]),
            default=(0.0, None),
        )[1]

    def add(self, moment: Moment) -> None:
        if not self._threshold or moment.moment_id in self._known:
            return
        own = self._known[moment.moment_id] = shingles(moment)
        for shingle in self._prefix(own):
            self._by_shingle.setdefault(shingle, []).append(moment.moment_id)

    def _prefix(self, of: Shingles) -> list[str]:
        """Two sets that are similar enough share at least ceil(threshold * size) elements, so of each the
        first ones in any fixed order, up to the number that may be missing and one more, must meet: prefix
        filtering (Chaudhuri, Ganti and Kaushik, A Primitive Operator for Similarity Joins, 2006). The rarest
        first: so texts of one template do not meet by it."""
        num = len(of) - math.ceil(self._threshold * len(of) - 1e-9) + 1
        return heapq.nsmallest(num, of, key=lambda shingle: (self._frequency[shingle], shingle))


def shingles(moment: Moment) -> Shingles:
    decided = moment.answer or moment.original
    assert decided is not None
    return triples(" ".join(_text(message) for message in (*moment.context[-1:], decided)))


def triples(text: str) -> Shingles:
    """Of words, lower case, without punctuation; a shorter text is one."""
    words = _WORD.findall(text.lower())
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return frozenset(" ".join(words[i : i + SHINGLE_WORDS]) for i in starts)


def similarity(a: Shingles, b: Shingles) -> float:
    """Jaccard: 1 for equal sets."""
    return len(a & b) / len(a | b)


def _text(message: Message) -> str:
    if not message.tool_calls:
        return message.content
    return f"{message.content} {msgspec.json.encode(message.tool_calls, order='sorted').decode()}"
