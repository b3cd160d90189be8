"""A conversation before and after stripping, as a diff: coloured on a terminal, plain elsewhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from apollo_curation.logs.conversation import Conversation
from apollo_curation.logs.strip import Removed, Stripped, whole_text

NUM_CONTEXT_LINES = 2
STYLES = {"-": "red", "+": "green", "@": "dim", "!": "yellow", "=": "bold"}
# A transcript must not move the cursor or change the terminal: control characters are shown as symbols.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    return _CONTROLS.sub(lambda found: f"\\x{ord(found.group()):02x}", text.replace("\r\n", "\n"))


def diff_lines(before: Conversation, stripped: Stripped, pruned: list[Removed]) -> Iterator[str]:
    """The lines of the diff; the first character says what each is: `-` went, `+` came, ` ` stays, `@` skips,
    `!` remarks, `=` heading. Messages are headed by their role in brackets."""
    yield f"= {visible(str(before.source))}"
    for part in pruned:
        for line in visible(part.text).split("\n"):
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
        yield f"! cannot be used: {visible(stripped.problem)}"


def print_diff(console: Console, before: Conversation, stripped: Stripped, pruned: list[Removed]) -> None:
    for line in diff_lines(before, stripped, pruned):
        shown = line[2:] if line[0] in "!=" else "..." if line[0] == "@" else line
        console.print(Text(shown, style=STYLES.get(line[0], "")), soft_wrap=True)


def _lines(conversation: Conversation) -> list[str]:
    lines: list[str] = []
    for message in conversation.messages:
        lines.append(f"[{visible(message.role)}]")
        lines += visible(whole_text(message)).split("\n")
    return lines
