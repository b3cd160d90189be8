"""What the adapters share: values of the right type, text out of content, tool calls as OpenAI has them."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from apollo_ipc.wire.requests import Message

TEXT_TYPES = ("text", "input_text", "output_text")


class Unreadable(ValueError):
    """reason: short and stable, for counting; the text is a sentence for a person."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Chat(msgspec.Struct, frozen=True):
    """What an adapter makes of a record; whether it is a valid conversation is looked at afterwards."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def as_object(value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unreadable("wrong_type", f"{at} is {name_of(value)}; an object is needed")
    return value


def as_list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unreadable("wrong_type", f"{at} is {name_of(value)}; a list is needed")
    return value


def as_string(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise Unreadable("wrong_type", f"{at} is {name_of(value)}; text is needed")
    return value


def name_of(value: Any) -> str:
    match value:
        case None:
            return "missing or null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"


def text_of(content: Any, at: str, joint: str = "\n") -> str:
    """Content as a string: null is empty, text parts are joined.

    Raises Unreadable: not_text where a part is an image, sound or the like, wrong_type for anything else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unreadable("wrong_type", f"{at} is {name_of(content)}; text, null or a list of parts is needed")
    return joint.join(_part_text(part, f"{at}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    kind = as_object(part, at).get("type")
    if kind in TEXT_TYPES:
        return as_string(part.get("text"), f"{at}.text")
    if kind == "refusal":
        return as_string(part.get("refusal"), f"{at}.refusal")
    if not isinstance(kind, str):
        raise Unreadable("wrong_type", f"{at}.type is {name_of(kind)}; it says what the part is")
    raise Unreadable("not_text", f"{at} is of type {kind!r}; only text can be learned")


def tool_call(name: Any, arguments: Any, call_id: Any, at: str) -> dict[str, Any]:
    """Arguments as JSON text, which is what OpenAI's API has; an object is written out."""
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, str):
        arguments = json.dumps(as_object(arguments, f"{at}.arguments"), ensure_ascii=False)
    call: dict[str, Any] = {"type": "function"}
    if call_id is not None:
        call["id"] = as_string(call_id, f"{at}.id")
    call["function"] = {"name": as_string(name, f"{at}.name"), "arguments": arguments}
    return call


def tool_list(tools: Any, at: str) -> list[dict[str, Any]] | None:
    """The tools that a record names; some formats keep them as JSON text."""
    if isinstance(tools, str):
        try:
            tools = msgspec.json.decode(tools) if tools.strip() else None
        except msgspec.DecodeError:
            raise Unreadable("wrong_type", f"{at} is text that is not JSON") from None
    if tools is None:
        return None
    return [as_object(tool, f"{at}[{i}]") for i, tool in enumerate(as_list(tools, at))] or None
