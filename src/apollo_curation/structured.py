"""JSON answers from a model, by a schema: one that does not parse is asked for once more, then given up."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec

from apollo_curation.chat_client import ChatClient
from apollo_ipc.wire.requests import Message

T = TypeVar("T", bound=msgspec.Struct)

_FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


class Counts:
    """How many answers parsed at the second attempt, and never."""

    def __init__(self) -> None:
        self.num_retried = 0
        self.num_dropped = 0


def ask_for(
    kind: type[T],
    model: ChatClient,
    messages: list[Message],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    counts: Counts | None = None,
) -> T | None:
    """The model's answer as `kind`, None where two answers did not parse.

    kind: a Struct of plain JSON types; its JSON Schema goes to the server for guided decoding.
    A server that ignores the schema is served too: the JSON may stand in a fenced block. Raises as
    ChatClient.chat does.
    """
    counts = counts or Counts()
    schema = plain_schema(kind)
    asked = messages
    for attempt in (0, 1):
        answer = model.chat(asked, max_tokens=max_tokens, temperature=temperature, schema=schema)
        try:
            found = parse(answer.content, kind)
        except (msgspec.DecodeError, ValueError) as error:
            reminder = (
                f"That was not the JSON that was asked for ({error}). Answer with one JSON object of this "
                f"schema and nothing else: {json.dumps(schema)}"
            )
            asked = [*messages, answer, Message("user", reminder)]
            continue
        if attempt:
            counts.num_retried += 1
        return found
    counts.num_dropped += 1
    return None


def parse(text: str, kind: type[T]) -> T:
    """Raises msgspec.DecodeError (ValidationError is one) or ValueError."""
    fenced = _FENCED.search(text)
    try:
        return msgspec.json.decode((fenced[1] if fenced else text).strip(), type=kind)
    except RecursionError as error:
        raise ValueError(f"nested too deep: {error}") from None


def plain_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON Schema of a flat Struct, without references: guided decoders differ in what they follow."""
    _, components = msgspec.json.schema_components([kind])
    schema = components[kind.__name__]
    schema.pop("description", None)
    schema["additionalProperties"] = False
    schema["required"] = list(kind.__struct_encode_fields__)
    for field in schema["properties"].values():
        field.pop("default", None)
    return schema
