"""What the confidence of a rule is made of.

Each piece of evidence has a weight: how sure one could be with it alone. Several are taken as independent:
confidence = 1 - (1 - w1)(1 - w2)... A doubt d, between 0 and 1, multiplies what is left by (1 - d). A moment
is flagged from MIN_CONFIDENCE on: one piece of strong evidence, or two weak ones. Never above MAX_CONFIDENCE:
a rule sees words, not whether they are true.
"""

from __future__ import annotations

import re

import msgspec

from apollo_curation.moments.moments import Kind
from apollo_ipc.wire.requests import Message

MIN_CONFIDENCE = 0.4
MAX_CONFIDENCE = 0.9

MAX_CHARS = 20_000  # of a text of which words are compared
MAX_WORDS = 300

# A word; of Chinese and Japanese, which have no spaces, a character.
_CJK = r"\u3040-\u30ff\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:[.,:]\d+)*")
# Too common to say what a text is about.
_COMMON = frozenset(
    """a an and are as at be but by can do does for from give have how i in is it its me my no not of on or
    our please some that the their them there these this to was we were what when where which who why
    will with would write you your aber am auf aus das dass dem den der des die du ein eine einen er es
    für ich im in ist mir mit nicht oder sich sie so und uns von was wie wir zu zum zur""".split()  # noqa: SIM905
)


class Noticed(msgspec.Struct, frozen=True):
    """What a rule found: messages[at] is the decision, the story ends before messages[end].

    answer: what shall be learned, None where the conversation holds none that could stand by itself.
    """

    kind: Kind
    at: int
    end: int
    answer: Message | None
    reason: str
    confidence: float
    is_told: bool = False  # not guessed: see Moment.is_told


class Evidence:
    """Collects what speaks for and against; `reason` tells it in words."""

    def __init__(self) -> None:
        self._left, self._doubt = 1.0, 1.0
        self._words: list[str] = []

    def add(self, weight: float, words: str) -> None:
        self._left *= 1 - weight
        self._words.append(words)

    def doubt(self, weight: float, words: str) -> None:
        self._doubt *= 1 - weight
        self._words.append(f"but {words}")

    @property
    def confidence(self) -> float:
        return round(min(MAX_CONFIDENCE, (1 - self._left) * self._doubt), 2)

    @property
    def is_enough(self) -> bool:
        return self.confidence >= MIN_CONFIDENCE

    @property
    def reason(self) -> str:
        text = "; ".join(self._words)
        return text[:1].upper() + text[1:] + "."


def num_words(text: str) -> int:
    return len(_WORD.findall(text))


def words(text: str) -> set[str]:
    """What a text is about: its words without the most common ones."""
    return {word for word in _WORD.findall(text[:MAX_CHARS].lower()) if word not in _COMMON}


def overlap(a: set[str], b: set[str]) -> float:
    """Of the smaller of the two, the share that is in both; 0 where one is empty."""
    return len(a & b) / min(len(a), len(b)) if a and b else 0.0


def likeness(a: str, b: str) -> float:
    """0 to 1: how much of two texts is the same words in the same order."""
    from difflib import SequenceMatcher

    first, second = (_WORD.findall(text[:MAX_CHARS].lower())[:MAX_WORDS] for text in (a, b))
    return SequenceMatcher(None, first, second, autojunk=False).ratio()
