"""A conversation put together item by item, as agents and chat programs log it.

One reply of a model may come as many items (a thought, a text, parallel calls), and results late or among
them; as OpenAI's chat has it, a reply is one message with all its calls, and their results follow it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from apollo_curation.logs.readers.text import RawChat, tool_call
from apollo_ipc.wire.requests import Message

UNSEEN = "answer to what is not text"  # of such weight 0: seen, not learned


class _Reply:
    def __init__(self, key: str | None, weight: int | None):
        self.key, self.weight = key, weight
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.results: list[Message] = []

    def messages(self) -> list[Message]:
        answer = Message(
            "assistant",
            "\n\n".join(self.texts),
            tool_calls=self.calls or None,
            reasoning_content="\n".join(self.thoughts) or None,
            weight=0 if self.weight == 0 else None,
        )
        return [answer, *self.results] if self.texts or self.calls else self.results


class Builder:
    """lost: what was left out, by name."""

    def __init__(self) -> None:
        self.lost: Counter[str] = Counter()
        self._items: list[Message | _Reply] = []
        self._by_call: dict[str, _Reply] = {}
        self._is_unseen = False  # something of this turn could not be read: what answers it is not learned

    def __len__(self) -> int:
        """Items so far, for `cut`."""
        return len(self._items)

    def cut(self, length: int, name: str = "other branch") -> None:
        """Takes back all but the first `length` items."""
        taken = len(self._items) - length
        if taken > 0:
            self.lost[name] += taken
            del self._items[length:]

    def system(self, text: str) -> None:
        if text.strip():
            self._items.append(Message("system", text))

    def user(self, text: str, *, is_unseen: bool = False) -> None:
        """is_unseen: something of it (an image) could not be read."""
        self._is_unseen = is_unseen
        self._items.append(Message("user", text))

    def unseen(self) -> None:
        """What comes next in this turn answers also something that could not be read."""
        self._is_unseen = True

    def say(self, text: str, key: str | None = None) -> None:
        """key: of the reply, where the format has one; items of equal keys are one message."""
        if text.strip():
            self._reply(key).texts.append(text)

    def think(self, text: str, key: str | None = None) -> None:
        if text.strip():
            self._reply(key).thoughts.append(text)

    def call(self, name: Any, arguments: Any, call_id: Any, at: str, key: str | None = None) -> None:
        """Raises Unreadable where it is no call."""
        made = tool_call(name, arguments, call_id, at)
        if call_id in self._by_call:
            self.lost["duplicate_id"] += 1
            return
        reply = self._reply(key)
        reply.calls.append(made)
        if call_id is not None:
            self._by_call[call_id] = reply

    def result(self, text: str, call_id: Any = None) -> None:
        """Of the call with this id; without one, of the latest call."""
        reply = self._by_call.get(call_id) if isinstance(call_id, str) else None
        if reply is None and call_id is None:
            last = self._items[-1] if self._items else None
            reply = last if isinstance(last, _Reply) and len(last.results) < len(last.calls) else None
        if reply is None:
            self.lost["tool result without a call"] += 1
        elif call_id is not None and any(one.tool_call_id == call_id for one in reply.results):
            self.lost["second result of a call"] += 1
        else:
            reply.results.append(Message("tool", text, tool_call_id=call_id))

    def chat(self) -> RawChat:
        messages: list[Message] = []
        for item in self._items:
            messages += [item] if isinstance(item, Message) else item.messages()
        return RawChat(messages, lost=self.lost)

    def keep_from_prompt(self, num_prompts: int) -> None:
        """Forgets all but the last `num_prompts` turns; nothing, where there are no more."""
        prompts = [
            i for i, item in enumerate(self._items) if isinstance(item, Message) and item.role == "user"
        ]
        if len(prompts) > num_prompts:
            del self._items[: prompts[-num_prompts]]
        kept = {id(item) for item in self._items}
        self._by_call = {name: reply for name, reply in self._by_call.items() if id(reply) in kept}
        self.lost = Counter()

    def _reply(self, key: str | None) -> _Reply:
        last = self._items[-1] if self._items else None
        if isinstance(last, _Reply) and (last.key == key if key is not None else not last.results):
            return last
        if self._is_unseen:
            self.lost[UNSEEN] += 1
        reply = _Reply(key, 0 if self._is_unseen else None)
        self._items.append(reply)
        return reply
