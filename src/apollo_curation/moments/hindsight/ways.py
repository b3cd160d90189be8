"""How the next message is used: shown before the answer, which is scored again; or scored itself, as a
complaint, as praise and as a question. Which way tells most differs from model to model: calibration measures
all and keeps the best."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Literal, get_args

import msgspec

from apollo_ipc.wire.requests import Message

WayName = Literal["question", "system", "again", "message"]
WAYS: tuple[WayName, ...] = get_args(WayName)

MAX_SHOWN_CHARS = 1000  # of a next message: who speaks of an answer does so at once
# What a message is scored behind (a noisy channel: arXiv:2108.04106).
COMPLAINT = "Write a message that says that an answer was wrong."
PRAISE = "Write a message that praises an answer."
QUESTION = "Write a question."

Score = Callable[[list[Message], Message], list[float]]  # ChatClient.answer_logprobs: nats of each token


class Spoken(msgspec.Struct, frozen=True):
    """Nats a token; the larger, the more the message spoke against the answer, or for it. num_tokens: so many
    were scored."""

    against: float
    praised: float
    num_tokens: int


def listen(way: WayName, context: list[Message], answer: Message, said_next: str, score: Score) -> Spoken:
    """What `said_next` says of `answer`. Raises what `score` does."""
    if way == "message":
        return _of_message(said_next[:MAX_SHOWN_CHARS], score)
    before = score(unshown(way, context, answer), answer)
    after = score(shown(way, context, answer, said_next), answer)
    difference = fmean(after) - fmean(before)
    return Spoken(-difference, difference, len(before))


def _of_message(said: str, score: Score) -> Spoken:
    """Without the token that ends the turn: a message that was cut has none."""
    asked = (COMPLAINT, PRAISE, QUESTION)
    scored = [score([Message("user", text)], Message("assistant", said)) for text in asked]
    complaint, praise, question = (fmean(one[:-1] or one) for one in scored)
    return Spoken(complaint - max(praise, question), praise - max(complaint, question), len(scored[0]))


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
