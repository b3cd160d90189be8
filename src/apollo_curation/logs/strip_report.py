"""What stripping takes out of a corpus: the share of its tokens, by rule and in all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import msgspec

from apollo_curation.logs.conversation import Conversation
from apollo_curation.logs.strip import Removed, Stripped, describe, whole_text
from apollo_curation.settings import StripRule

CountTokens = Callable[[str], int]
WENT_ALONG = "went with what was stripped"
_PIECE = re.compile(r"\w+|[^\w\s]")


def estimate_tokens(text: str) -> int:
    """Words and marks: near a tokenizer's count for English text, lower for most others."""
    return sum(1 for _ in _PIECE.finditer(text))


class RuleShare(msgspec.Struct, frozen=True):
    """share: of all tokens that were read."""

    rule: str
    num_parts: int
    num_tokens: int
    share: float


class StripReport(msgspec.Struct, frozen=True):
    """num_changed: of those that can be used; num_refused: whose rest cannot be; problems and notes: how
    often each occurred; is_estimate: tokens were counted without a tokenizer."""

    num_conversations: int
    num_changed: int
    num_refused: int
    num_tokens: int
    num_removed_tokens: int
    share: float
    is_estimate: bool
    rules: list[RuleShare]
    problems: dict[str, int]
    notes: dict[str, int]


class Tally:
    """count_tokens: for exact numbers lambda text: len(model.text_tokens(text, add_special_tokens=False))."""

    def __init__(self, rules: list[StripRule], count_tokens: CountTokens | None = None):
        self._names = [describe(rule) for rule in rules]
        self._count = count_tokens or estimate_tokens
        self._is_estimate = count_tokens is None
        self._num_conversations = self._num_changed = self._num_left = 0
        self._parts: Counter[int | None] = Counter()
        self._tokens: Counter[int | None] = Counter()
        self._problems: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()

    def add(self, stripped: Stripped, pruned: list[Removed]) -> None:
        """pruned: what the pruner took out of its raw record."""
        self._num_conversations += 1
        removed = [*pruned, *stripped.removed]
        for part in removed:
            self._parts[part.rule] += 1
            self._tokens[part.rule] += self._count(part.text)
            if part.note:
                self._notes[part.note] += 1
        self._num_left += self._num_tokens(stripped.conversation)
        if stripped.problem is not None:
            self._problems[re.sub(r"message \d+", "a message", stripped.problem)] += 1
        elif removed:
            self._num_changed += 1

    def report(self) -> StripReport:
        num_removed = self._tokens.total()
        num_tokens = num_removed + self._num_left
        kinds: list[tuple[int | None, str]] = [*enumerate(self._names), (None, WENT_ALONG)]
        return StripReport(
            num_conversations=self._num_conversations,
            num_changed=self._num_changed,
            num_refused=self._problems.total(),
            num_tokens=num_tokens,
            num_removed_tokens=num_removed,
            share=num_removed / max(1, num_tokens),
            is_estimate=self._is_estimate,
            rules=[
                RuleShare(name, self._parts[i], self._tokens[i], self._tokens[i] / max(1, num_tokens))
                for i, name in kinds
                if i is not None or self._parts[i]
            ],
            problems=dict(self._problems),
            notes=dict(self._notes),
        )

    def _num_tokens(self, conversation: Conversation) -> int:
        return sum(self._count(whole_text(message)) for message in conversation.messages)
