"""A conversation as it was logged, made a valid one (conversation.find_problem): what does not fit is left
out by its name, and the rest kept where it stays true."""

from __future__ import annotations

from collections import Counter

import msgspec

from apollo_curation.logs.mend import is_empty, mend
from apollo_curation.logs.readers.text import RawChat
from apollo_ipc.wire.requests import Message

DEPENDED = "answer or result of what was lost"
MIDDLE = "instructions in the middle"
FIRST = "assistant before the first question"
NO_CALL = "tool result without a call"
NO_RESULT = "tool call without a result"
DUPLICATE = "duplicate_id"
JOINED = "messages of one role joined"


def settle(chat: RawChat) -> tuple[list[Message], Counter[str]]:
    """The messages, and everything that was lost of the record, by name."""
    lost = Counter(chat.lost)
    messages = chat.messages
    if chat.gone:
        messages, dropped = mend(messages, chat.gone)
        lost[DEPENDED] += len(dropped)
    settled = _Settled(lost)
    for message in messages:
        settled.add(message)
    return settled.messages, +lost


class _Settled:
    def __init__(self, lost: Counter[str]):
        self.messages: list[Message] = []
        self._lost = lost
        self._waiting: list[str | None] = []  # ids of calls that have no result yet
        self._caller = -1  # where they were made

    def add(self, message: Message) -> None:
        out = self.messages
        if message.role == "tool":
            self._result(message)
            return
        if message.role not in ("user", "assistant", "system", "developer"):
            self._lost[f"role {message.role[:40]}"] += 1
            return
        self._close()
        last = out[-1].role if out else ""
        if message.role in ("system", "developer"):
            if last in ("", "system", "developer"):
                out.append(message)
            else:
                self._lost[MIDDLE] += 1
        elif message.role == "user":
            if last == "user":
                self._join(message)
            else:
                out.append(message)
        elif last in ("", "system", "developer"):
            self._lost[FIRST] += 1
        else:
            message = self._without_duplicates(message)
            if last == "assistant":
                self._join(message)
            else:
                out.append(message)
            self._waiting = [call.get("id") for call in message.tool_calls or []]
            self._caller = len(out) - 1

    def _result(self, message: Message) -> None:
        known = message.tool_call_id
        if not self._waiting or (known is not None and any(self._waiting) and known not in self._waiting):
            self._lost[NO_CALL] += 1
            return
        self._waiting.remove(known if known in self._waiting else self._waiting[0])
        self.messages.append(message)

    def _close(self) -> None:
        """Somebody speaks: calls that nothing has answered go."""
        if not self._waiting:
            return
        self._lost[NO_RESULT] += len(self._waiting)
        caller = self.messages[self._caller]
        calls = list(caller.tool_calls or [])
        for waiting in reversed(self._waiting):
            at = max(i for i, call in enumerate(calls) if call.get("id") == waiting)
            del calls[at]
        self._waiting = []
        rest = msgspec.structs.replace(caller, tool_calls=calls or None)
        if is_empty(rest):
            del self.messages[self._caller]
        else:
            self.messages[self._caller] = rest

    def _join(self, message: Message) -> None:
        last = self.messages[-1]
        self._lost[JOINED] += 1
        weights = (last.weight, message.weight)
        thoughts = [one.reasoning_content for one in (last, message) if one.reasoning_content]
        self.messages[-1] = msgspec.structs.replace(
            last,
            content="\n\n".join(text for text in (last.content, message.content) if text.strip()),
            tool_calls=message.tool_calls,
            reasoning_content="\n".join(thoughts) or None,
            weight=0 if 0 in weights else None,
        )

    def _without_duplicates(self, message: Message) -> Message:
        seen: set[str | None] = set()
        calls = []
        for call in message.tool_calls or []:
            if call.get("id") is not None and call["id"] in seen:
                self._lost[DUPLICATE] += 1
                continue
            seen.add(call.get("id"))
            calls.append(call)
        if len(calls) == len(message.tool_calls or []):
            return message
        return msgspec.structs.replace(message, tool_calls=calls)
