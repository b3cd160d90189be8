"""A conversation as every later stage sees it, where it came from, and what makes it a valid one."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import msgspec

from apollo_ipc.wire.requests import Message


class Origin(msgspec.Struct, frozen=True):
    """Where a record was read: file, number of its line or entry (from 1), and byte offset of its start."""

    path: str
    number: int
    offset: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


class Feedback(msgspec.Struct, frozen=True):
    """What somebody said of the last answer, by `POST /feedback`."""

    rating: str | None = None  # up, down
    correction: str | None = None  # what the answer should have been


class Conversation(msgspec.Struct, frozen=True):
    """messages: as OpenAI's chat API has them, content as text; topic: what the record says it is about, else
    the name of its file."""

    messages: list[Message]
    source: Origin
    topic: str
    tools: list[dict[str, Any]] | None = None
    removed: list[str] = []  # hashes (text_hash) of what was stripped so far
    lost: dict[str, int] = {}  # what the reader left out, by name
    feedback: Feedback | None = None


class Broken(msgspec.Struct, frozen=True):
    """A record that could not be read: reason is a short stable name for counting, message a sentence."""

    source: Origin
    reason: str
    message: str
    lost: dict[str, int] = {}  # by name, where parts of it were left out before


def text_hash(text: str) -> str:
    """16 hex digits that are equal for equal texts."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def find_problem(messages: list[Message]) -> str | None:
    """Why this is no valid conversation, or None.

    Valid: system and developer messages first; then user and assistant in turn, where an assistant turn may
    be several messages as long as each but the last calls tools and every call is answered, by `tool`
    messages that follow it at once. After tool results the user may speak before the assistant does. It may
    end with a tool call that nothing answered.
    """
    state = "start"  # who may speak next: start, user, assistant, either of the two, tools
    waiting: list[str | None] = []
    for i, message in enumerate(messages):
        at = f"message {i} ({message.role})"
        match message.role:
            case "system" | "developer":
                if state != "start":
                    return f"{at}: instructions stand before the first turn"
            case "user":
                if waiting:
                    return f"{at}: the tool call before it has no result"
                if state == "assistant":
                    return f"{at}: follows a user's message without an answer between"
                state = "assistant"
            case "assistant":
                if waiting:
                    return f"{at}: the tool call before it has no result"
                if state not in ("assistant", "either"):
                    return f"{at}: follows no user's message or tool result"
                waiting = [call.get("id") for call in message.tool_calls or []]
                state = "tools" if waiting else "user"
            case "tool":
                if state != "tools" or not waiting:
                    return f"{at}: a tool result without a call before it"
                known = message.tool_call_id
                if known is not None and any(waiting) and known not in waiting:
                    return f"{at}: answers call {known!r}, which was not made"
                waiting.remove(known if known in waiting else waiting[0])
                if not waiting:
                    state = "either"
            case _:
                return f"{at}: an unknown role; known are system, developer, user, assistant and tool"
    return None
