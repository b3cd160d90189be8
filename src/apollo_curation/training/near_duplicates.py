"""Examples that say nearly the same: Jaccard similarity of their word triples, found by MinHash and LSH."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from apollo_curation.moments.moments import Moment
from apollo_ipc.wire.requests import Message

NUM_PERMUTATIONS = 128
SHINGLE_WORDS = 3
# LSH only proposes, and what it proposes is compared exactly, so it may propose too much: with these, of a
# thousand pairs that are just as similar as curation.near_duplicate is by default, about one is missed.
LSH_MARGIN = 0.15
LSH_WEIGHTS = (0.1, 0.9)  # of proposing in vain, of missing
LSH_RANGE = (0.05, 0.8)

_WORD = re.compile(r"\w+")

Shingles = frozenset[str]


class NearDuplicates:
    """threshold: the similarity (0 to 1) from which two are one; 0 finds none, 1 only equal word triples.

    Looks at the decision alone: the last message of the context, and the answer. Two moments of one
    conversation share what came before. Deterministic.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._lsh: Any = None
        self._known: dict[str, Shingles] = {}

    def find(self, moment: Moment) -> str | None:
        """The id of the added moment that is most similar, None where none is similar enough."""
        if not self._threshold or not self._known:
            return None
        own = shingles(moment)
        near = [(similarity(own, self._known[key]), key) for key in self._lsh.query(_minhash(own))]
        found = [(value, key) for value, key in near if value >= self._threshold]
        return min(found, key=lambda one: (-one[0], one[1]))[1] if found else None

    def add(self, moment: Moment) -> None:
        if not self._threshold or moment.moment_id in self._known:
            return
        own = shingles(moment)
        if self._lsh is None:
            self._lsh = _new_lsh(self._threshold)
        self._lsh.insert(moment.moment_id, _minhash(own))
        self._known[moment.moment_id] = own


def shingles(moment: Moment) -> Shingles:
    """Word triples, lower case, without punctuation; a shorter text is one shingle."""
    assert moment.answer is not None
    words: list[str] = []
    for message in (*moment.context[-1:], moment.answer):
        words += _WORD.findall(_text(message).lower())
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return frozenset(" ".join(words[i : i + SHINGLE_WORDS]) for i in starts)


def similarity(a: Shingles, b: Shingles) -> float:
    """Jaccard: 1 for equal sets."""
    return len(a & b) / len(a | b)


def _text(message: Message) -> str:
    if not message.tool_calls:
        return message.content
    return f"{message.content} {msgspec.json.encode(message.tool_calls, order='sorted').decode()}"


def _new_lsh(threshold: float) -> Any:
    from datasketch import MinHashLSH  # here: it imports scipy, which takes a second or two

    low, high = LSH_RANGE
    proposed_from = min(high, max(low, threshold - LSH_MARGIN))
    return MinHashLSH(threshold=proposed_from, num_perm=NUM_PERMUTATIONS, weights=LSH_WEIGHTS)


def _minhash(of: Shingles) -> Any:
    from datasketch import MinHash

    signature = MinHash(num_perm=NUM_PERMUTATIONS)
    signature.update_batch([one.encode("utf-8", "surrogatepass") for one in of])
    return signature
