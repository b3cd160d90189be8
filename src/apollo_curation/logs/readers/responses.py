"""OpenAI's Responses: {"input": text or items, "output": items, "instructions"}; Codex logs the items too."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.injected import note_of
from apollo_curation.logs.readers.text import (
    RawChat,
    Unreadable,
    as_list,
    as_object,
    as_string,
    of_another_kind,
    text_of,
    tool_list,
)

ITEMS = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "local_shell_call",
    "local_shell_call_output",
)


def is_record(record: dict[str, Any]) -> bool:
    output = record.get("output")
    return (
        "input" in record
        and isinstance(output, list)
        and any(isinstance(item, dict) and item.get("type") in ITEMS for item in output)
    )


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable where input or output is of another kind."""
    builder = Builder()
    if isinstance(record.get("instructions"), str):
        builder.system(record["instructions"])
    asked = record.get("input")
    items = [{"role": "user", "content": asked}] if isinstance(asked, str) else as_list(asked, "input")
    add_all(builder, items, "input")
    add_all(builder, as_list(record.get("output") or [], "output"), "output")
    tools = [tool for tool in tool_list(record.get("tools"), "tools") or [] if tool.get("type") == "function"]
    return msgspec.structs.replace(builder.chat(), tools=[_tool(tool) for tool in tools] or None)


def add_all(builder: Builder, items: list[Any], at: str) -> None:
    for i, item in enumerate(items):
        try:
            with of_another_kind():
                add(builder, as_object(item, f"{at}[{i}]"), f"{at}[{i}]")
        except Unreadable as error:
            builder.lost[error.reason] += 1


def add(builder: Builder, item: dict[str, Any], at: str) -> bool:
    """Whether it is a user's prompt. Raises Unreadable."""
    kind = item.get("type") or ("message" if "role" in item else "part of no type")
    call_id = item.get("call_id") or item.get("id")
    match kind:
        case "message":
            return _message(builder, item, at)
        case "reasoning":
            parts = [part for name in ("summary", "content") for part in item.get(name) or []]
            builder.think(text_of(parts, at, builder.lost))
        case "function_call":
            builder.call(item.get("name"), item.get("arguments"), call_id, at)
        case "custom_tool_call":
            builder.call(item.get("name"), {"input": item.get("input")}, call_id, at)
        case "local_shell_call":
            action = as_object(item.get("action"), f"{at}.action")
            builder.call("shell", {"command": action.get("command")}, call_id, at)
        case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
            builder.result(_output(builder, item.get("output"), f"{at}.output"), call_id)
        case _:
            builder.lost[str(kind)] += 1
    return False


def _message(builder: Builder, item: dict[str, Any], at: str) -> bool:
    role = as_string(item.get("role"), f"{at}.role")
    num_lost = builder.lost.total()
    try:
        text = text_of(item.get("content"), f"{at}.content", builder.lost)
    except Unreadable as error:
        if error.reason != "not_text":
            raise
        text = ""
    if role == "assistant":
        builder.say(text)
    elif role == "user":
        if name := note_of(text):
            builder.lost[f"injected: {name}"] += 1
            return False
        builder.user(text, is_unseen=builder.lost.total() > num_lost)
        return True
    else:
        builder.system(text)
    return False


def _output(builder: Builder, output: Any, at: str) -> str:
    if isinstance(output, dict):
        output = output.get("content", output.get("output", json.dumps(output)))
    try:
        return text_of(output, at, builder.lost)
    except Unreadable:
        builder.unseen()
        return "[not text]"


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool:
        return tool
    kept = {name: tool[name] for name in ("name", "description", "parameters") if name in tool}
    return {"type": "function", "function": kept}
