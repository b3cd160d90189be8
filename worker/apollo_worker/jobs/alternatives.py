"""Several answers to one context, as plain examples: each is then tokenised like any other."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from apollo_ipc.errors import UserError
from apollo_ipc.wire.examples import Answer, Completion, Example, Message, has_answers, rewards_of
from apollo_worker.jobs.objective import advantages_of


class Alternative(NamedTuple):
    """One answer. example: it alone; path: its field; ids: where it is given as tokens behind a context that
    is text, and `example` is the context; is_chosen: of a pair; advantage, logprobs: of a group's."""

    example: Example
    path: str
    ids: list[int] | None = None
    is_chosen: bool | None = None
    advantage: float | None = None
    logprobs: list[float] | None = None


def alternatives(example: Example, path: str) -> list[Alternative]:
    """Of a pair the chosen and the rejected, of a group each completion; none of another example."""
    if not has_answers(example):
        return []
    if example.completions is None:
        assert example.chosen is not None
        assert example.rejected is not None
        return [
            _alternative(example, example.chosen, f"{path}.chosen")._replace(is_chosen=True),
            _alternative(example, example.rejected, f"{path}.rejected")._replace(is_chosen=False),
        ]
    found: list[Alternative] = []
    for i, advantage in enumerate(advantages_of(rewards_of(example))):
        one, field, logprobs = example.completions[i], f"{path}.completions[{i}]", None
        if isinstance(one, Completion):
            name = next(name for name in ("text", "ids", "message") if getattr(one, name) is not None)
            field, logprobs, one = f"{field}.{name}", one.logprobs, getattr(one, name)
        answer = _alternative(example, one, field)
        found.append(answer._replace(advantage=advantage, logprobs=logprobs))
    return found


def at_its_answer(error: UserError, path: str, one: Alternative) -> UserError:
    """An error of its plain example, at the field that the client sent."""
    num_context = len(one.example.messages or []) - 1
    field = (error.field or path).removeprefix(path)
    for mine in (".completion", ".continuation_ids", f".messages[{num_context}]"):
        if field.startswith(mine):
            return UserError(error.message, field=one.path + field.removeprefix(mine), code=error.code)
    return error


def _alternative(example: Example, answer: Answer, path: str) -> Alternative:
    context = msgspec.structs.replace(
        example, chosen=None, rejected=None, completions=None, rewards=None, messages=_context(example)
    )
    if isinstance(answer, list):
        if example.context_ids is None:
            return Alternative(context, path, answer)
        return Alternative(msgspec.structs.replace(context, continuation_ids=answer), path)
    if context.messages is None:
        assert isinstance(answer, str)
        return Alternative(msgspec.structs.replace(context, completion=answer), path)
    said = Message("assistant", answer) if isinstance(answer, str) else answer
    return Alternative(msgspec.structs.replace(context, messages=[*context.messages, said]), path)


def _context(example: Example) -> list[Message] | None:
    """Earlier turns of the assistant are read, not learned."""
    if example.messages is None:
        return None
    return [
        msgspec.structs.replace(one, weight=0) if one.role == "assistant" else one for one in example.messages
    ]
