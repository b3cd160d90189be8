"""How the next message is shown before an answer is scored again. Which way tells most differs from model to
model: calibration measures all and keeps the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import msgspec

from apollo_ipc.wire.requests import Message

WayName = Literal["question", "system", "again"]
WAYS: tuple[WayName, ...] = get_args(WayName)

MAX_SHOWN_CHARS = 2000  # of a next message: who speaks of an answer does so at once


def shown(way: WayName, context: list[Message], answer: Message, said_next: str) -> list[Message]:
    """The context with the next message in it, behind which the answer is scored."""
    return _SHOW[way](context, answer, said_next[:MAX_SHOWN_CHARS])


def unshown(way: WayName, context: list[Message], answer: Message) -> list[Message]:
    """What `shown` is compared with: the same without the message, so that the way itself makes no
    difference."""
    return _again(context, answer, "OK.") if way == "again" else context


def _question(context: list[Message], answer: Message, said_next: str) -> list[Message]:
    """Behind the question, as arXiv:2603.12273 words it."""
    at = _last_user(context)
    hint = "The following is a future user message. Use this to guide your answer to the user prompt: "
    asked = msgspec.structs.replace(context[at], content=f"{context[at].content}\n\n{hint}{said_next}")
    return [*context[:at], asked, *context[at + 1 :]]


def _system(context: list[Message], answer: Message, said_next: str) -> list[Message]:
    """In the instructions."""
    hint = f"After your answer the user will say: {said_next}"
    if context[0].role == "system":
        joined = msgspec.structs.replace(context[0], content=f"{context[0].content}\n\n{hint}")
        return [joined, *context[1:]]
    return [Message("system", hint), *context]


def _again(context: list[Message], answer: Message, said_next: str) -> list[Message]:
    """As it happened, and then the same question once more."""
    question = context[_last_user(context)]
    heard = [Message("user", said_next), Message("assistant", "OK."), question]
    return [*context, answer, *heard]


def _last_user(context: list[Message]) -> int:
    return max(i for i, message in enumerate(context) if message.role == "user")


_SHOW: dict[WayName, Callable[[list[Message], Message, str], list[Message]]] = {
    "question": _question,
    "system": _system,
    "again": _again,
}
