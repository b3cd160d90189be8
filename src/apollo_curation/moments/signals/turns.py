"""A conversation as turns: what a user said, and all that the assistant did until the user spoke again."""

from __future__ import annotations

import msgspec

from apollo_ipc.wire.requests import Message


class UserTurn(msgspec.Struct, frozen=True):
    """user: index of the user's message; steps: indices of the assistant's messages; end: index after the
    last message of the turn."""

    messages: list[Message]
    user: int
    steps: list[int]
    end: int

    @property
    def said(self) -> str:
        return self.messages[self.user].content

    @property
    def final(self) -> int | None:
        """Index of the answer in words that ends the turn; None where it ends in a call or in nothing."""
        if not self.steps or self.messages[self.steps[-1]].tool_calls:
            return None
        return self.steps[-1]

    @property
    def answer(self) -> str:
        return "" if self.final is None else self.messages[self.final].content


def turns(messages: list[Message]) -> list[UserTurn]:
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    ends = [*users[1:], len(messages)]
    return [
        UserTurn(messages, user, [i for i in range(user, end) if messages[i].role == "assistant"], end)
        for user, end in zip(users, ends, strict=True)
    ]
