"""The held-out set: examples that are never trained, each with a category, from a JSONL file."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from apollo_curation.logs.conversation import find_problem, text_hash
from apollo_ipc.errors import ConfigError, UserError
from apollo_ipc.wire.requests import Example, Message, check_form, convert

FORMS = (
    '{"category": "...", "messages": [...]}, with "prompt" and "completion", or with "context_ids" and '
    '"continuation_ids"'
)


class HeldOut(msgspec.Struct, frozen=True):
    """line: its number in the file, from 1."""

    example: Example
    category: str
    line: int


class HeldOutSet:
    """Examples in the order of the file; never empty."""

    def __init__(self, path: Path, examples: list[HeldOut]):
        assert examples
        self.path = path
        self.examples = examples
        self._decisions = {key for one in examples for key in decisions(one.example)}

    @property
    def categories(self) -> dict[str, list[HeldOut]]:
        found: dict[str, list[HeldOut]] = {}
        for one in self.examples:
            found.setdefault(one.category, []).append(one)
        return found

    def contains(self, example: Example) -> bool:
        """Whether training on `example` would teach something that is measured here: the same answer to the
        same turn, whatever instructions and older turns stand before it."""
        return not self._decisions.isdisjoint(decisions(example))


def load_heldout(path: str) -> HeldOutSet:
    """The file `path` (quality.heldout). Raises ConfigError, naming the line and its field."""
    if not path:
        raise ConfigError(
            "no held-out set: name a JSONL file of examples that are never trained, or set quality.enabled "
            "= false",
            field="quality.heldout",
        )
    file = Path(path).expanduser()
    try:
        examples = list(_read(file))
    except OSError as error:
        raise ConfigError(
            f"cannot read {file}: {error.strerror}; it holds one example a line: {FORMS}",
            field="quality.heldout",
        ) from None
    if not examples:
        raise ConfigError(
            f"{file} is empty, so nothing would be watched: put examples into it, one a line: {FORMS}",
            field="quality.heldout",
        )
    return HeldOutSet(file, examples)


def heldout_examples(path: str) -> list[Example]:
    """Those of the file `path`, none where no file is named. Raises ConfigError as `load_heldout` does."""
    return [one.example for one in load_heldout(path).examples] if path else []


def examples_hash(examples: list[HeldOut]) -> str:
    """Equal where losses can be compared: the same examples, in any order."""
    contents = sorted(msgspec.json.encode(one.example, order="sorted") for one in examples)
    return blake2b(b"\n".join(contents), digest_size=8).hexdigest()


def decisions(example: Example) -> set[str]:
    """A hash of each thing that is learned: of a conversation, every learned answer with what leads to it
    from the last user's message on."""
    if example.messages is None:
        parts = (example.prompt, example.completion, example.context_ids, example.continuation_ids)
        return {_key(list(parts))}
    found, start = set(), 0
    for i, message in enumerate(example.messages):
        if message.role == "user":
            start = i
        elif message.role == "assistant" and message.weight != 0:
            found.add(_key([_told(one) for one in example.messages[start : i + 1]]))
    return found


def _key(parts: list[Any]) -> str:
    return text_hash(msgspec.json.encode(parts).decode())


def _told(message: Message) -> list[Any]:
    """Who says what, without what differs between two records of it: spaces, and the ids of calls."""
    calls = [call.get("function") for call in message.tool_calls or []]
    return [message.role, " ".join(message.content.split()), calls]


def _read(file: Path) -> Iterator[HeldOut]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _parse(line, number)
                except UserError as error:
                    field = (error.field or "").lstrip(".")
                    at = f"{file}:{number}: {field}" if field else f"{file}:{number}"
                    raise ConfigError(error.message, field=at) from None


def _parse(line: bytes, number: int) -> HeldOut:
    try:
        data = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not JSON ({error}); a line looks like {FORMS}") from None
    except RecursionError:
        raise UserError("nested too deeply") from None
    if not isinstance(data, dict):
        raise UserError(f"a line looks like {FORMS}")
    category = data.pop("category", None)
    if not isinstance(category, str) or not category.strip():
        raise UserError("every example has one, as text; its losses are watched together", field="category")
    example = convert(data, Example)
    check_form(example, "")
    if example.messages is not None:
        _check_messages(example.messages)
    elif not example.prompt and not example.context_ids and _num_learned(example) < 2:
        raise UserError("nothing predicts the first token: give it a prompt or context")
    return HeldOut(example, category.strip(), number)


def _check_messages(messages: list[Message]) -> None:
    if problem := find_problem(messages):
        raise UserError(problem, field="messages")
    if messages[-1].role != "assistant" or messages[-1].weight == 0:
        raise UserError("ends with the assistant's answer that is measured", field="messages")


def _num_learned(example: Example) -> int:
    return len(example.continuation_ids or example.completion or "")
