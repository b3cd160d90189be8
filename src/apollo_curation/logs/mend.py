"""A conversation of which messages were taken out, made valid again by taking out what depended on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from apollo_ipc.wire.requests import Message

CALL_WENT = "its result was stripped"
RESULT_WENT = "its call was stripped"
ANNOUNCED = "announced a call that was stripped"
QUESTION_WENT = "answered a message that was stripped"
ANSWER_WENT = "its answer was stripped"


class Dropped(NamedTuple):
    """What went with the stripped messages: a message as it was, or only its calls that went."""

    message: Message
    why: str


def is_empty(message: Message) -> bool:
    """Whether it says nothing; a thought without an answer is nothing."""
    return not message.content.strip() and not message.tool_calls


def mend(messages: list[Message], gone: Iterable[int]) -> tuple[list[Message], list[Dropped]]:
    """`messages` without those at the positions `gone`, and what was dropped beside them.

    A tool call goes with its result and the other way round; a text before calls that all went goes too when
    the same turn has more to say. A user's message that goes takes its whole answer with it, unless it stood
    behind tool results: then the answer goes on from those. A user's message whose answer went goes too,
    unless nothing follows. Faults that were there before are left alone.
    """
    dropped: list[Dropped] = []
    left = _mend_calls(messages, set(gone), dropped)
    kept: list[tuple[int, Message]] = []
    is_unasked = False  # the question of this turn went
    for i, original in enumerate(messages):
        message = left.get(i)
        if original.role == "user":
            goes_on = i > 0 and messages[i - 1].role == "tool"
            is_unasked = message is None and (is_unasked or not goes_on)
        if message is None:
            continue
        if is_unasked and message.role in ("assistant", "tool"):
            dropped.append(Dropped(message, QUESTION_WENT))
            continue
        if kept and i > kept[-1][0] + 1 and message.role == kept[-1][1].role == "user":
            dropped.append(Dropped(kept.pop()[1], ANSWER_WENT))
        elif kept and message.role == kept[-1][1].role == "assistant" and _lost_calls(messages, kept[-1]):
            dropped.append(Dropped(kept.pop()[1], ANNOUNCED))
        kept.append((i, message))
    return [message for _, message in kept], dropped


def _lost_calls(messages: list[Message], entry: tuple[int, Message]) -> bool:
    """Whether results followed it once, and now it calls nothing."""
    i, message = entry
    return i + 1 < len(messages) and messages[i + 1].role == "tool" and not message.tool_calls


def _mend_calls(messages: list[Message], gone: set[int], dropped: list[Dropped]) -> dict[int, Message]:
    """What is left by position, calls and results in agreement."""
    left = {i: message for i, message in enumerate(messages) if i not in gone}
    i = 0
    while i < len(messages):
        calls = messages[i].tool_calls
        results = range(i + 1, i + 1)
        if messages[i].role in ("assistant", "tool"):
            end = i + 1
            while end < len(messages) and messages[end].role == "tool":
                end += 1
            # A result that starts a run has no assistant before it: an orphan of calls that were cut away.
            results = range(i if messages[i].role == "tool" else i + 1, end)
        answered = _answers(messages, calls or [], results)
        for k in results:
            if k in left and (answered.get(k) is None or i not in left):
                dropped.append(Dropped(left.pop(k), RESULT_WENT))
        if calls and i in left:
            lost = {answered[k] for k in results if k not in left and answered.get(k) is not None}
            if lost:
                left[i] = _without_calls(left[i], lost, dropped)
                if is_empty(left[i]):
                    del left[i]
        i = max(results.stop, i + 1)
    return left


def _answers(messages: list[Message], calls: list[dict], results: range) -> dict[int, int | None]:
    """Which call each result answers: by id, else in order."""
    waiting: list[int] = list(range(len(calls)))
    answers: dict[int, int | None] = {}
    for k in results:
        known = messages[k].tool_call_id
        matching = [c for c in waiting if known is not None and calls[c].get("id") == known]
        nameless = [c for c in waiting if known is None or calls[c].get("id") is None]
        answers[k] = None
        if fitting := matching or nameless:
            answers[k] = fitting[0]
            waiting.remove(fitting[0])
    return answers


def _without_calls(message: Message, lost: set[int | None], dropped: list[Dropped]) -> Message:
    calls = message.tool_calls or []
    went = [call for c, call in enumerate(calls) if c in lost]
    dropped.append(Dropped(Message("assistant", "", tool_calls=went), CALL_WENT))
    rest = [call for c, call in enumerate(calls) if c not in lost]
    return msgspec.structs.replace(message, tool_calls=rest or None)
