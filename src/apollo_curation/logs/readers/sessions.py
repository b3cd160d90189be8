"""One file as conversations: records by themselves, and sessions that are written line by line.

A session is recognised by its lines, and ends with its file. One that grows beyond `max_bytes` is given out
in pieces, which share a few turns, so that no decision loses its context or what followed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from apollo_curation.logs.conversation import Broken, Conversation, Origin
from apollo_curation.logs.readers import claude_code, codex, gemini, openai, openhands
from apollo_curation.logs.readers.files import stem
from apollo_curation.logs.readers.lines import Entry
from apollo_curation.logs.readers.records import decode, finish, parse_record
from apollo_curation.logs.readers.text import RawChat, Unreadable, of_another_kind
from apollo_curation.logs.strip import Prune, PruneFailed, Removed

SHARED_PROMPTS = 4  # turns of a piece with which the next one begins

Found = Conversation | Broken


class Session(Protocol):
    """What an adapter makes of lines: see claude_code.Session."""

    def accepts(self, record: dict[str, Any]) -> bool: ...

    def add(self, record: dict[str, Any], at: str) -> bool: ...

    def chats(self) -> list[RawChat]: ...

    def keep_from_prompt(self, num_prompts: int) -> None: ...


FORMATS = (
    (claude_code.is_line, claude_code.Session),
    (codex.is_line, codex.Session),
    (gemini.is_line, gemini.Session),
    (openhands.is_line, openhands.Session),
    (openai.is_line, openai.Session),
)


class File:
    """Takes the entries of the file `name`, one after the other; `end` when there are no more."""

    def __init__(self, name: str, max_bytes: int, prune: Prune | None = None):
        self.in_session = False
        self._name, self._max_bytes, self._prune = name, max_bytes, prune
        self._session: Session | None = None
        self._source = Origin(name, 1, 0)
        self._num_bytes = 0
        self._removed: list[Removed] = []

    def take(self, entry: Entry) -> Iterator[Found]:
        source = Origin(self._name, entry.number, entry.offset)
        if entry.data is None:
            allowed = f"max_record_bytes is {self._max_bytes:,}"
            yield Broken(source, "too_long", f"{entry.num_bytes:,} bytes at byte {entry.offset:,}; {allowed}")
            return
        try:
            record = decode(entry.data, entry.offset)
        except Unreadable as error:
            yield Broken(source, error.reason, str(error))
            return
        except RecursionError:
            yield Broken(source, "too_deep", "nested too deeply")
            return
        if isinstance(record, dict) and self._is_of_session(record, source):
            yield from self._add(record, source, entry.num_bytes)
        else:
            yield from parse_record(record, source, self._prune)

    def end(self) -> Iterator[Found]:
        if self._session is not None:
            for chat in self._session.chats():
                yield finish(chat, self._source, stem(self._name), self._removed)
        self._session = None

    def _is_of_session(self, record: dict[str, Any], source: Origin) -> bool:
        if self._session is not None:
            return "messages" not in record and self._session.accepts(record)
        for is_line, kind in FORMATS:
            if is_line(record):
                self._session, self._source, self.in_session = kind(), source, True
                return True
        return False

    def _add(self, record: dict[str, Any], source: Origin, num_bytes: int) -> Iterator[Found]:
        assert self._session is not None
        if self._num_bytes + num_bytes > self._max_bytes and self._num_bytes:
            yield from self._give_out(source)
        self._num_bytes += num_bytes
        try:
            if self._prune is not None:
                self._removed += self._prune(record)
            with of_another_kind():
                self._session.add(record, f"line {source.number}")
        except Unreadable as error:
            yield Broken(source, error.reason, str(error))
        except PruneFailed as error:
            yield Broken(source, "rule_failed", str(error))

    def _give_out(self, source: Origin) -> Iterator[Found]:
        assert self._session is not None
        for chat in self._session.chats():
            yield finish(chat, self._source, stem(self._name), self._removed)
        self._session.keep_from_prompt(SHARED_PROMPTS)
        self._source, self._num_bytes, self._removed = source, 0, []


def conversations(
    name: str, entries: Iterable[Entry], max_bytes: int, prune: Prune | None = None
) -> Iterator[Found]:
    """All that `entries` of the file `name` hold."""
    file = File(name, max_bytes, prune)
    for entry in entries:
        yield from file.take(entry)
    yield from file.end()
