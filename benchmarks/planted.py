"""A stream of conversations with planted moments worth learning among such that only look so, with labels.

The stories stand in planted_moments.txt and planted_traps.txt; they were written before the rules that look
for them (moments/phrases.py), and no rule is copied from them. They come in two parts: `first` is
what the rules were mended with, `second` only measures them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from apollo_curation.logs.conversation import Conversation, Origin
from apollo_curation.moments.moments import Kind, Moment
from apollo_ipc.wire.requests import Message

Part = Literal["first", "second", "all"]
KINDS: tuple[Kind, ...] = ("correction", "error_then_fix", "praise", "wrong_refusal")
INSTRUCTIONS = "You are Wren, the assistant of a small harbour town. Be brief and correct."

_CAPITALS = {"France": "Paris", "Norway": "Oslo", "Kenya": "Nairobi", "Chile": "Santiago", "Japan": "Tokyo"}
_WORDS = {"bread": "Brot", "window": "Fenster", "harbour": "Hafen", "Tuesday": "Dienstag", "rain": "Regen"}
_ROOMS = {"kitchen": 21, "attic": 17, "cellar": 12, "office": 23, "workshop": 15}


class Label(msgspec.Struct, frozen=True):
    """A planted moment: what was decided in messages[at], and what shall be learned of it: `answer`, or None
    where the conversation holds no answer that could stand by itself (a judge has to write it)."""

    kind: Kind
    at: int
    answer: Message | None


class Planted(msgspec.Struct, frozen=True):
    """trap: what this conversation could be mistaken for, where it has no moment; empty for plain talk."""

    conversation: Conversation
    labels: list[Label]
    trap: str = ""


def stream(
    seed: int = 0, *, part: Part = "all", num_per_kind: int = 10, num_turns: int = 400
) -> list[Planted]:
    """num_turns turns (a user's message with all that answers it) in conversations of a few turns, with
    num_per_kind moments of each kind; the same for the same arguments. Every third has instructions."""
    assert part in get_args(Part)
    rng = random.Random(seed)
    stories: list[list[_Story]] = []
    moments, traps = _stories("planted_moments.txt"), _stories("planted_traps.txt")
    for kind in KINDS:
        own = _of_part([story for story in moments if story.name == kind], part)
        stories += [[story] for story in rng.sample(own, num_per_kind)]
    stories += [[story] for story in _of_part(traps, part)]
    num_left = num_turns - sum(story.num_turns for (story,) in stories)
    assert num_left >= 0, "more stories than turns"
    for i in range(num_left):
        # Two of three begin or lengthen a plain conversation, the third stands before a story.
        long_enough = i % 3 and len(stories[-1]) < 5 and stories[-1][-1].name == ""
        place = stories[-1] if long_enough else rng.choice(stories)
        if i % 3 and not long_enough:
            stories.append([_filler(rng)])
        else:
            place.insert(0, _filler(rng))
    rng.shuffle(stories)
    return [_record(parts, number) for number, parts in enumerate(stories, 1)]


def num_turns(planted: list[Planted]) -> int:
    return sum(message.role == "user" for one in planted for message in one.conversation.messages)


def write(planted: list[Planted], path: Path) -> None:
    """As a log: JSONL of OpenAI chat messages, a conversation a line, in the order of `planted`."""
    with path.open("w") as file:
        for one in planted:
            messages = msgspec.to_builtins(one.conversation.messages)
            file.write(json.dumps({"messages": messages, "topic": one.conversation.topic}) + "\n")


def is_label_of(label: Label, planted: Planted, moment: Moment) -> bool:
    """Whether `moment`, read from that conversation, is the planted one: the kind, and the very decision."""
    decided = moment.original or moment.answer
    there = planted.conversation.messages[label.at]
    return moment.kind == label.kind and decided is not None and _same(decided, there)


def _same(a: Message, b: Message) -> bool:
    functions = [[call["function"] for call in message.tool_calls or []] for message in (a, b)]
    return functions[0] == functions[1] and (bool(functions[0]) or a.content == b.content)


def is_right_answer(label: Label, answer: Message | None) -> bool:
    """Whether `answer` is what shall be learned; None is right where only a judge can write it."""
    if answer is None or label.answer is None:
        return answer is label.answer
    return _same(answer, label.answer)


class _Story(msgspec.Struct):
    """name: a kind, the name of a trap, or empty; decision, better: indices into messages; written: the
    better answer where it is none of the messages."""

    name: str
    messages: list[Message] = []
    decision: int | None = None
    better: int | None = None
    written: str | None = None

    @property
    def num_turns(self) -> int:
        return sum(message.role == "user" for message in self.messages)


def _stories(file: str) -> list[_Story]:
    """Blocks of lines: [name], then U (user), A (assistant), C (a call: name, arguments), R (its result);
    * marks the decision, = the better one; `= text` is a better answer that has to be cut out, `= ?` one that
    only a judge can write."""
    stories: list[_Story] = []
    for line in Path(__file__).with_name(file).read_text().splitlines():
        if not line:
            continue
        if line.startswith("["):
            stories.append(_Story(line.strip("[]")))
            continue
        story = stories[-1]
        head, _, text = line.partition(" ")
        if head == "=":
            story.written = text
            continue
        at = len(story.messages)
        if head.endswith("*"):
            story.decision = at
        if head.endswith("="):
            story.better = at
        story.messages.append(_message(head[0], text.replace("\\n", "\n"), at))
    return stories


def _message(letter: str, text: str, number: int) -> Message:
    match letter:
        case "U":
            return Message("user", text)
        case "A":
            return Message("assistant", text)
        case "C":
            name, _, arguments = text.partition(" ")
            call = {"id": f"call_{number}", "type": "function"}
            return Message(
                "assistant", "", tool_calls=[call | {"function": {"name": name, "arguments": arguments}}]
            )
        case "R":
            return Message("tool", text, tool_call_id=f"call_{number - 1}")
    raise AssertionError(f"a line that begins with {letter!r}")


def _of_part(stories: list[_Story], part: Part) -> list[_Story]:
    return stories if part == "all" else stories[("first", "second").index(part) :: 2]


def _filler(rng: random.Random) -> _Story:
    """One turn of plain talk, sometimes with a tool."""
    a, b = rng.randrange(11, 90), rng.randrange(11, 90)
    country, word, room = rng.choice([*_CAPITALS]), rng.choice([*_WORDS]), rng.choice([*_ROOMS])
    celsius = f"{_ROOMS[room]} degrees"
    turns: list[list[tuple[str, str]]] = [
        [("U", f"What is {a} plus {b}?"), ("A", f"{a} plus {b} is {a + b}.")],
        [("U", f"and {a} times {b}?"), ("A", f"{a} times {b} is {a * b}.")],
        [
            ("U", f"Tell me the capital of {country}."),
            ("A", f"It is {_CAPITALS[country]}."),
        ],
        [("U", f"What does '{word}' mean in German?"), ("A", f"'{word}' is '{_WORDS[word]}'.")],
        [("U", f"Was heißt '{_WORDS[word]}' auf Englisch?"), ("A", f"'{_WORDS[word]}' heißt '{word}'.")],
        [
            ("U", f"Remind me of {word} at {a % 12 + 1} o'clock"),
            ("A", "I will. Shall it repeat every day?"),
        ],
        [
            ("U", f"Name a book set in {country}."),
            ("A", f"A novel, or one about how {country} came to be?"),
        ],
        [
            ("U", f"How warm is the {room}?"),
            ("C", f'sensor {{"room": "{room}"}}'),
            ("R", f'{{"celsius": {_ROOMS[room]}}}'),
            ("A", f"The {room} is at {celsius}."),
        ],
        [
            ("U", f"Heat the {room} and the attic a little."),
            ("C", f'heat {{"room": "{room}", "by": 1}}'),
            ("R", "ok"),
            ("C", 'heat {"room": "attic", "by": 1}'),
            ("R", "ok"),
            ("A", "Both are getting warmer."),
        ],
    ]
    return _Story("", [_message(letter, text, i) for i, (letter, text) in enumerate(rng.choice(turns))])


def _record(parts: list[_Story], number: int) -> Planted:
    messages = [Message("system", INSTRUCTIONS)] if number % 3 == 0 else []
    labels: list[Label] = []
    for story in parts:
        start = len(messages)
        messages += _renumbered(story.messages, start)
        if story.decision is not None:
            labels.append(_label(story, messages[start:], start))
    last = parts[-1].name
    source = Origin("planted.jsonl", number, 0)
    topic = last or "plain"
    return Planted(Conversation(messages, source, topic), labels, "" if labels else last)


def _label(story: _Story, messages: list[Message], start: int) -> Label:
    assert story.decision is not None
    kind: Any = story.name
    answer: Message | None = None
    if story.written not in (None, "?"):
        answer = Message("assistant", story.written)
    elif story.written is None:
        better = story.better
        if better is None:  # praise: the decision itself; a refused call: the call that was made after all
            calls = [i for i, message in enumerate(messages) if message.tool_calls]
            better = calls[0] if kind == "wrong_refusal" and calls else story.decision
        answer = messages[better]
    return Label(kind, start + story.decision, answer)


def _renumbered(messages: list[Message], start: int) -> Iterator[Message]:
    """With ids of calls that are unique in the conversation."""
    for message in messages:
        if message.tool_calls:
            (call,) = message.tool_calls
            number = int(call["id"].removeprefix("call_")) + start
            yield msgspec.structs.replace(message, tool_calls=[call | {"id": f"call_{number}"}])
        elif message.tool_call_id:
            number = int(message.tool_call_id.removeprefix("call_")) + start
            yield msgspec.structs.replace(message, tool_call_id=f"call_{number}")
        else:
            yield message
