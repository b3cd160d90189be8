"""How the next message is used: shown before the answer, which is scored again; or scored itself, as a
complaint, as praise and as a question. Which way tells most differs from model to model: calibration measures
all and keeps the best."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Literal, get_args

import msgspec

from apollo_ipc.wire.requests import Message

WayName = Literal["question", "message"]
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
    before = score(context, answer)
    after = score(shown(context, said_next), answer)
    difference = fmean(after) - fmean(before)
    return Spoken(-difference, difference, len(before))


def _of_message(said: str, score: Score) -> Spoken:
    """Without the token that ends the turn: a message that was cut has none."""
    asked = (COMPLAINT, PRAISE, QUESTION)
    scored = [score([Message("user", text)], Message("assistant", said)) for text in asked]
    complaint, praise, question = (fmean(one[:-1] or one) for one in scored)
    return Spoken(complaint - max(praise, question), praise - max(complaint, question), len(scored[0]))


def shown(context: list[Message], said_next: str) -> list[Message]:
    """The context with the next message behind its question, as arXiv:2603.12273 words it."""
    at = max(i for i, message in enumerate(context) if message.role == "user")
    hint = "The following is a future user message. Use this to guide your answer to the user prompt: "
    text = f"{context[at].content}\n\n{hint}{said_next[:MAX_SHOWN_CHARS]}"
    return [*context[:at], msgspec.structs.replace(context[at], content=text), *context[at + 1 :]]
