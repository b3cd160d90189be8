"""What the dreamer is asked, and the JSON in which it answers."""

from __future__ import annotations

import msgspec

from apollo_ipc.wire.requests import Message


class Situation(msgspec.Struct):
    """turns: what the person and the assistant say in turn; the person begins, and has the last word."""

    turns: list[str]
    good: str


class DreamVerdict(msgspec.Struct):
    """The reason stands first: a model that writes in order judges after it has thought."""

    reason: str
    good: bool
    confidence: float


class Better(msgspec.Struct):
    response: str


IMAGINE = """\
You write training situations for an assistant. You are given a lesson that it should live by. Write a
conversation between a person and the assistant that arrives, naturally, at a point where the assistant's
next response shows whether it has taken the lesson in. The conversation never mentions the lesson, gives no
instructions to follow it and does not hint at the right response: someone who does not know the lesson
notices nothing.
Answer in JSON: `turns`, a list of texts, the person's first, then the assistant's and the person's in turn;
the person has the last word, so their number is odd (1 to 7). No names of speakers in the texts. `good`: in
one or two sentences, what a good next response does, and what a bad one does."""

VARIATION = """\
Write a variation of the situation below: the same lesson decides, but people, subject, wording and course are
new, so that nothing of it can be known by heart."""

JUDGE = """\
You judge one response of an assistant against a lesson. You see the lesson, what a good response does, the
conversation, and the response. It is good where a person who lives by the lesson would have answered in
that way, in content and in manner; talk about the lesson without living it is bad, and so is a response that
breaks off. Judge what is there, not what was perhaps meant.
Answer in JSON: `reason`, one or two sentences; `good`, true or false; `confidence`, 0 to 1, how sure you
are."""

IMPROVE = """\
You write the response that an assistant should have given. You see a lesson, what a good response does, the
conversation, the response that was given and what was wrong with it. Write a response to the last message as
somebody would who has made the lesson their own: complete, natural, in the language and about the length
that the conversation asks for. It never mentions the lesson, this task or the earlier response.
Answer in JSON: `response`, the text of the response alone."""


def imagine(lesson: str, parent: list[Message] | None, earlier: list[list[Message]]) -> list[Message]:
    """parent: the situation to vary; earlier: others that it must not be like."""
    parts = [_section("Lesson", lesson)]
    if parent is not None:
        parts += [VARIATION, _section("Situation", as_text(parent))]
    if earlier:
        parts.append("These were used before; write something else:")
        parts += [_section(f"Used {i}", as_text(messages)) for i, messages in enumerate(earlier, 1)]
    return [Message("system", IMAGINE), Message("user", "\n\n".join(parts))]


def judge(lesson: str, good: str, situation: list[Message], response: str) -> list[Message]:
    return [Message("system", JUDGE), Message("user", _case(lesson, good, situation, response))]


def improve(lesson: str, good: str, situation: list[Message], response: str, reason: str) -> list[Message]:
    case = _case(lesson, good, situation, response)
    return [Message("system", IMPROVE), Message("user", f"{case}\n\n{_section('What was wrong', reason)}")]


def as_text(messages: list[Message]) -> str:
    """A conversation for a reader. What a tool was called with belongs to it."""
    lines = []
    for message in messages:
        lines.append(f"{message.role}: {message.content}")
        lines += [f"{message.role} calls: {call.get('function', call)}" for call in message.tool_calls or []]
    return "\n".join(lines)


def _case(lesson: str, good: str, situation: list[Message], response: str) -> str:
    parts = [_section("Lesson", lesson)] if lesson else []
    parts += [_section("A good response", good)] if good else []
    return "\n\n".join([*parts, _section("Conversation", as_text(situation)), _section("Response", response)])


def _section(name: str, text: str) -> str:
    return f"<{name}>\n{text}\n</{name}>"
