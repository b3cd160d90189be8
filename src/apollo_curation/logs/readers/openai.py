"""OpenAI chat messages: {"messages": [{"role", "content", "tool_calls", ...}], "tools": [...]}."""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers.text import (
    Chat,
    as_list,
    as_object,
    as_string,
    text_of,
    tool_call,
    tool_list,
)
from apollo_ipc.wire.requests import Message


def read_chat(record: dict[str, Any]) -> Chat:
    """Raises Unreadable."""
    key = "messages" if "messages" in record else "conversations"
    messages: list[Message] = []
    legacy_id: str | None = None  # of the function_call that the next function message answers
    for i, raw in enumerate(as_list(record.get(key), key)):
        at = f"{key}[{i}]"
        message = _message(as_object(raw, at), at)
        if raw.get("function_call") is not None and message.role == "assistant" and not message.tool_calls:
            legacy_id = f"call_{i}"
            call = _call({"function": raw["function_call"], "id": legacy_id}, f"{at}.function_call")
            message = Message("assistant", message.content, tool_calls=[call])
        elif message.role == "function":
            message = Message("tool", message.content, name=message.name, tool_call_id=legacy_id)
        messages.append(message)
    return Chat(messages, tool_list(record.get("tools"), "tools") or _functions(record))


def _message(raw: dict[str, Any], at: str) -> Message:
    role = as_string(raw.get("role"), f"{at}.role")
    content = text_of(raw.get("content"), f"{at}.content")
    name = raw.get("name")
    if role != "assistant":
        call_id = raw.get("tool_call_id")
        return Message(
            role=role,
            content=content,
            name=name if isinstance(name, str) else None,
            tool_call_id=None if call_id is None else as_string(call_id, f"{at}.tool_call_id"),
        )
    calls = as_list(raw.get("tool_calls") or [], f"{at}.tool_calls")
    thought = raw.get("reasoning_content") or raw.get("reasoning")
    refusal = raw.get("refusal")
    return Message(
        role=role,
        content=content or (refusal if isinstance(refusal, str) else ""),
        name=name if isinstance(name, str) else None,
        tool_calls=[_call(call, f"{at}.tool_calls[{k}]") for k, call in enumerate(calls)] or None,
        reasoning_content=thought if isinstance(thought, str) else None,
        weight=0 if raw.get("weight") == 0 else None,
    )


def _call(raw: Any, at: str) -> dict[str, Any]:
    function = as_object(as_object(raw, at).get("function"), f"{at}.function")
    return tool_call(function.get("name"), function.get("arguments"), raw.get("id"), at)


def _functions(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`functions`, which `tools` replaced."""
    functions = tool_list(record.get("functions"), "functions")
    return functions and [{"type": "function", "function": function} for function in functions]
