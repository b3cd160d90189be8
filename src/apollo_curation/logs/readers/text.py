"""What the adapters share: values of the right type, text out of content, tool calls as OpenAI has them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from apollo_ipc.wire.requests import Message

TEXT_TYPES = ("text", "input_text", "output_text", "summary_text", "reasoning_text")


class Unreadable(ValueError):
    """reason: short and stable, for counting; the text is a sentence for a person."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class RawChat(msgspec.Struct, frozen=True):
    """What an adapter makes of a record; settle.py makes a valid conversation of it.

    gone: positions of messages of which nothing could be read; lost: what was left out, by name; problem: the
    first thing that could not be read.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    lost: Counter[str] = msgspec.field(default_factory=Counter)
    gone: set[int] = set()
    problem: Unreadable | None = None


@contextmanager
def of_another_kind() -> Iterator[None]:
    """A record of foreign programs may have anything anywhere: what an adapter stumbles over is named, and
    the next one read."""
    try:
        yield
    except Unreadable:
        raise
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"[:200]
        raise Unreadable("wrong_type", f"a value is of another kind than its format says ({said})") from None


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


def text_of(content: Any, at: str, lost: Counter[str] | None = None, joint: str = "\n") -> str:
    """Content as a string: null is empty, text parts are joined; others are left out and counted in `lost` by
    their type.

    Raises Unreadable: not_text where nothing but such parts is there (or `lost` is not given), wrong_type for
    content that is neither text nor parts.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unreadable("wrong_type", f"{at} is {name_of(content)}; text, null or a list of parts is needed")
    texts: list[str] = []
    problem: Unreadable | None = None
    for i, part in enumerate(content):
        try:
            texts.append(_part_text(part, f"{at}[{i}]"))
        except Unreadable as error:
            if lost is None:
                raise
            lost[kind_of(part)] += 1
            problem = problem or error
    if problem is not None and not any(text.strip() for text in texts):
        raise problem
    return joint.join(texts)


def kind_of(part: Any) -> str:
    """What a part that is no text calls itself."""
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) and kind else "part of no type"


def _part_text(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    kind = as_object(part, at).get("type")
    if kind in TEXT_TYPES or (kind is None and isinstance(part.get("text"), str)):
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


def embedded(value: Any) -> Any:
    """The JSON that a text holds, where it holds an object or a list; else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return value
    return value
