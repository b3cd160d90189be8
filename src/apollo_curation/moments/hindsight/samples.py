"""The labelled samples that hindsight is calibrated with: samples.txt beside this file, or a file of that
form."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import msgspec

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

Label = Literal["against", "for", "neither"]

FORM = "a block of lines is `[LABEL LANGUAGE]`, then `U text`, `A text`, `C name arguments` or `R result`"


class LabelledSample(msgspec.Struct, frozen=True):
    """context: what led to the answer; said_next: the user's next message, which speaks against the answer,
    for it, or of neither."""

    label: str
    language: str
    context: list[Message]
    answer: Message
    said_next: str
    reply: list[Message] = []  # what the assistant said to that, where the file holds it


def read_samples(file: Path | None = None) -> list[LabelledSample]:
    """Of `file`, or our own. Raises UserError naming the line that is none of the form, or a block without a
    question, an answer and a next message."""
    name = str(file or "samples.txt")
    text = file.read_text() if file else _own_text()
    blocks: list[tuple[int, str, list[Message]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        head, _, rest = line.partition(" ")
        if line.startswith("["):
            blocks.append((number, line.strip("[] "), []))
        elif blocks and head in ("U", "A", "C", "R"):
            messages = blocks[-1][2]
            messages.append(_message(head, rest.replace("\\n", "\n"), len(messages)))
        else:
            raise UserError(f"no line of a sample; {FORM}", field=f"{name}:{number}")
    return [_sample(head, messages, f"{name}:{number}") for number, head, messages in blocks]


def calibrating_samples(file: Path | None = None) -> list[LabelledSample]:
    """As read_samples. Raises UserError where a label is none of against, for, neither."""
    samples = read_samples(file)
    for sample in samples:
        if sample.label not in get_args(Label):
            raise UserError(
                f"a label is one of {', '.join(get_args(Label))}, not {sample.label!r}", field=str(file)
            )
    return samples


def _own_text() -> str:
    return files("apollo_curation.moments.hindsight").joinpath("samples.txt").read_text(encoding="utf-8")


def _message(letter: str, text: str, number: int) -> Message:
    if letter == "C":
        name, _, arguments = text.partition(" ")
        function = {"name": name, "arguments": arguments}
        return Message(
            "assistant", "", tool_calls=[{"id": f"call_{number}", "type": "function", "function": function}]
        )
    if letter == "R":
        return Message("tool", text, tool_call_id=f"call_{number - 1}")
    return Message("user" if letter == "U" else "assistant", text)


def _sample(head: str, messages: list[Message], at: str) -> LabelledSample:
    label, _, language = head.partition(" ")
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if len(users) < 2 or messages[users[-1] - 1].role != "assistant" or messages[users[-1] - 1].tool_calls:
        raise UserError("a sample is a question, an answer in words and the user's next message", field=at)
    last = users[-1]
    return LabelledSample(
        label,
        language,
        messages[: last - 1],
        messages[last - 1],
        messages[last].content,
        messages[last + 1 :],
    )
