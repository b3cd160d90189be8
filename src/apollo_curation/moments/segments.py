"""The short stretch of a conversation that leads to one decision."""

from __future__ import annotations

from bisect import bisect_left
from itertools import takewhile

from apollo_ipc.wire.requests import Message

SEGMENT_MESSAGES = 8  # before a decision, so many are kept


class Segments:
    """Of one valid conversation; a decision costs what its segment holds, however long it is."""

    def __init__(self, messages: list[Message], num_messages: int):
        self._messages, self._num_messages = messages, num_messages
        self._users = [i for i, message in enumerate(messages) if message.role == "user"]
        self._instructions = list(takewhile(lambda one: one.role in ("system", "developer"), messages))

    def before(self, at: int) -> list[Message]:
        """The context of the decision messages[at], an assistant's message.

        At most num_messages messages, from a user's message on, as many as fit; instructions at the
        beginning, where there still are any, come on top. Where not even the decision's own turn fits, its
        question stays and the oldest of its tool calls go, each with its results; the last call stays however
        long it is.
        """
        messages = self._messages
        assert messages[at].role == "assistant"
        first = bisect_left(self._users, at - self._num_messages)
        if first < len(self._users) and self._users[first] < at:
            return self._instructions + messages[self._users[first] : at]
        question = self._users[first - 1]
        near = range(max(question + 1, at - self._num_messages + 1), at)
        start = next((i for i in near if messages[i].role == "assistant"), at)
        while messages[start].role != "assistant" or start == at:
            start -= 1
        return [*self._instructions, messages[question], *messages[start:at]]
