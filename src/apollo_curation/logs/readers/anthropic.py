"""Anthropic messages: {"system": ..., "messages": [...]} with content blocks, as OpenAI's chat has them.

A user message's tool results become `tool` messages, its text the user's message after them. Messages of one
role in a row are one turn there, and are joined here.
"""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers.text import (
    Chat,
    Unreadable,
    as_list,
    as_object,
    as_string,
    name_of,
    text_of,
    tool_call,
    tool_list,
)
from apollo_ipc.wire.requests import Message

OWN_BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")


def is_anthropic(record: dict[str, Any]) -> bool:
    """Whether `messages` are of this form: by a `system` beside them or blocks that only this form has."""
    messages = [raw for raw in record.get("messages") or [] if isinstance(raw, dict)]
    if any(raw.get("role") not in ("user", "assistant") or raw.get("tool_calls") for raw in messages):
        return False
    if "system" in record:
        return True
    blocks = (block for raw in messages if isinstance(raw.get("content"), list) for block in raw["content"])
    return any(isinstance(block, dict) and block.get("type") in OWN_BLOCKS for block in blocks)


def read_chat(record: dict[str, Any]) -> Chat:
    """Raises Unreadable."""
    messages: list[Message] = []
    if record.get("system"):
        messages.append(Message("system", text_of(record["system"], "system")))
    for role, blocks in _turns(as_list(record.get("messages"), "messages")):
        messages += _assistant(blocks) if role == "assistant" else _user(blocks)
    tools = tool_list(record.get("tools"), "tools")
    return Chat(messages, tools and [_tool(tool) for tool in tools])


Block = tuple[str, dict[str, Any]]  # where it stands, and what it is


def _turns(raw_messages: list[Any]) -> list[tuple[str, list[Block]]]:
    turns: list[tuple[str, list[Block]]] = []
    for i, raw in enumerate(raw_messages):
        at = f"messages[{i}]"
        role = as_string(as_object(raw, at).get("role"), f"{at}.role")
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        turns[-1][1].extend(_blocks(raw.get("content"), f"{at}.content"))
    return turns


def _blocks(content: Any, at: str) -> list[Block]:
    if isinstance(content, str):
        return [(at, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise Unreadable("wrong_type", f"{at} is {name_of(content)}; text or a list of blocks is needed")
    return [(f"{at}[{i}]", as_object(block, f"{at}[{i}]")) for i, block in enumerate(content)]


def _user(blocks: list[Block]) -> list[Message]:
    results, text = [], []
    for at, block in blocks:
        if block.get("type") == "tool_result":
            content = text_of(block.get("content"), f"{at}.content")
            if block.get("is_error") and not content.lower().startswith("error"):
                content = f"Error: {content}"  # OpenAI's tool messages have no other place for it
            call_id = as_string(block.get("tool_use_id"), f"{at}.tool_use_id")
            results.append(Message("tool", content, tool_call_id=call_id))
        else:
            text.append(text_of([block], at))
    joined = "\n".join(part for part in text if part)
    return [*results, Message("user", joined)] if joined or not results else results


def _assistant(blocks: list[Block]) -> list[Message]:
    text, thoughts, calls = [], [], []
    for at, block in blocks:
        match block.get("type"):
            case "tool_use":
                calls.append(tool_call(block.get("name"), block.get("input"), block.get("id"), at))
            case "thinking":
                thoughts.append(as_string(block.get("thinking"), f"{at}.thinking"))
            case "redacted_thinking":
                pass  # encrypted
            case _:
                text.append(text_of([block], at))
    return [
        Message(
            "assistant",
            "".join(text),
            tool_calls=calls or None,
            reasoning_content="\n".join(thoughts) or None,
        )
    ]


def _tool(raw: dict[str, Any]) -> dict[str, Any]:
    names = {"name": "name", "description": "description", "input_schema": "parameters"}
    return {"type": "function", "function": {new: raw[old] for old, new in names.items() if old in raw}}
