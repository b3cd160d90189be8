"""What stripping takes out of a corpus: the share of its tokens, a conversation before and after, and the
rest as JSONL."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from rich.console import Console
from rich.text import Text

from apollo_curation.logs.conversation import Conversation
from apollo_curation.logs.strip import Removed, Stripped, describe, whole_text
from apollo_curation.printable import printable
from apollo_curation.settings import StripRule
from apollo_ipc.errors import UserError

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


class StripTally:
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


NUM_CONTEXT_LINES = 2
STYLES = {"-": "red", "+": "green", "@": "dim", "!": "yellow", "=": "bold"}


def diff_lines(before: Conversation, stripped: Stripped, pruned: list[Removed]) -> Iterator[str]:
    """The lines of the diff; the first character says what each is: `-` went, `+` came, ` ` stays, `@` skips,
    `!` remarks, `=` heading. Messages are headed by their role in brackets."""
    yield f"= {printable(str(before.source))}"
    for part in pruned:
        for line in printable(part.text).split("\n"):
            yield f"-{line}"
        yield "! taken out of the record, before it was read as a conversation"
    old, new = _lines(before), _lines(stripped.conversation)
    for line in list(difflib.unified_diff(old, new, lineterm="", n=NUM_CONTEXT_LINES))[2:]:
        yield "@" if line.startswith("@@") else line
    if not stripped.removed and not pruned:
        yield "! nothing is stripped"
    for note in sorted({part.note for part in stripped.removed if part.note}):
        yield f"! {note}"
    if stripped.problem is not None:
        yield f"! cannot be used: {printable(stripped.problem)}"


def print_diff(console: Console, before: Conversation, stripped: Stripped, pruned: list[Removed]) -> None:
    for line in diff_lines(before, stripped, pruned):
        shown = line[2:] if line[0] in "!=" else "..." if line[0] == "@" else line
        console.print(Text(shown, style=STYLES.get(line[0], "")), soft_wrap=True)


def _lines(conversation: Conversation) -> list[str]:
    lines: list[str] = []
    for message in conversation.messages:
        lines.append(f"[{printable(message.role)}]")
        lines += printable(whole_text(message)).split("\n")
    return lines


class StrippedFile:
    """`with StrippedFile(path, sources) as file: file.add(...)`; without a path it only counts.

    The file appears under its name when all is written, in place of an older one; nothing is left of it after
    an error. Raises UserError where it cannot be written, or is one of the files that are read.
    """

    def __init__(self, path: Path | None, sources: Iterable[Path]):
        self.num_written = 0
        self._path = path
        self._file: BinaryIO | None = None
        if path is None:
            return
        if path.exists() and any(path.samefile(source) for source in sources):
            raise UserError(f"{path} is one of the files that are read; choose another name", field="--out")
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self._file = self._part.open("xb")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", field="--out") from None

    def add(self, conversation: Conversation) -> None:
        """One without any answer is left out: there is nothing to learn in it."""
        if self._file is None or all(message.role != "assistant" for message in conversation.messages):
            return
        line: dict[str, Any] = {"messages": conversation.messages}
        if conversation.tools:
            line["tools"] = conversation.tools
        self._file.write(msgspec.json.encode(line) + b"\n")
        self.num_written += 1

    def __enter__(self) -> StrippedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None or self._path is None:
            return
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink()
