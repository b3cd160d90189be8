"""Rollouts of Codex: a file is one session, a line an item of OpenAI's Responses, or a note about it.

{"timestamp", "type": "session_meta" | "response_item" | "event_msg" | ..., "payload"}; older versions wrote
the items bare. What an event_msg tells stands in an item as well.
"""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers import responses
from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.text import RawChat, as_object

LINES = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")


def is_line(record: dict[str, Any]) -> bool:
    kind = record.get("type")
    if kind in LINES and "payload" in record:
        return True
    if kind in responses.ITEMS and "messages" not in record:
        return "role" in record or "call_id" in record or "summary" in record
    return {"id", "timestamp", "instructions"} <= record.keys()


class Session:
    def __init__(self) -> None:
        self._builder = Builder()

    def accepts(self, record: dict[str, Any]) -> bool:
        return isinstance(record.get("type"), str) or record.get("record_type") == "state"

    def add(self, record: dict[str, Any], at: str) -> bool:
        """Whether it is a user's prompt. Raises Unreadable."""
        kind = record.get("type")
        payload = record.get("payload")
        if kind == "response_item":
            return responses.add(self._builder, as_object(payload, f"{at}.payload"), f"{at}.payload")
        if kind in responses.ITEMS:
            return responses.add(self._builder, record, at)
        meta = payload if isinstance(payload, dict) else record
        base = meta.get("base_instructions")
        text = meta.get("instructions") or (base.get("text") if isinstance(base, dict) else base)
        if isinstance(text, str) and not len(self._builder):
            self._builder.system(text)
        self._builder.lost[str(kind or record.get("record_type") or "session_meta")] += 1
        return False

    def chats(self) -> list[RawChat]:
        return [self._builder.chat()]

    def keep_from_prompt(self, num_prompts: int) -> None:
        self._builder.keep_from_prompt(num_prompts)
