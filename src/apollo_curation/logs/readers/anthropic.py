"""Anthropic messages: {"system": ..., "messages": [...]} with content blocks, as OpenAI's chat has them.

A user message's tool results become `tool` messages, its text the user's message after them. Messages of one
role in a row are one turn there, and are joined here.
"""

from __future__ import annotations

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
    kind_of,
    name_of,
    text_of,
    tool_list,
)

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


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable where there is no list of messages."""
    builder = Builder()
    if record.get("system"):
        builder.system(text_of(record["system"], "system", builder.lost))
    problem: Unreadable | None = None
    for i, (role, blocks) in enumerate(_turns(as_list(record.get("messages"), "messages"), builder)):
        read = _reply if role == "assistant" else _said
        problem = read(builder, blocks, str(i)) or problem
    tools = tool_list(record.get("tools"), "tools")
    chat = builder.chat()
    return msgspec.structs.replace(chat, tools=tools and [_tool(tool) for tool in tools], problem=problem)


Block = tuple[str, Any]  # where it stands, and what it is


def _turns(raw_messages: list[Any], builder: Builder) -> list[tuple[str, list[Block]]]:
    turns: list[tuple[str, list[Block]]] = []
    for i, raw in enumerate(raw_messages):
        at = f"messages[{i}]"
        try:
            role = as_string(as_object(raw, at).get("role"), f"{at}.role")
            blocks = _blocks(raw.get("content"), f"{at}.content")
        except Unreadable as error:
            builder.lost[error.reason] += 1
            continue
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        turns[-1][1].extend(blocks)
    return turns


def _blocks(content: Any, at: str) -> list[Block]:
    if isinstance(content, str):
        return [(at, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise Unreadable("wrong_type", f"{at} is {name_of(content)}; text or a list of blocks is needed")
    return [(f"{at}[{i}]", block) for i, block in enumerate(content)]


def _said(builder: Builder, blocks: list[Block], key: str) -> Unreadable | None:
    texts: list[str] = []
    problem: Unreadable | None = None
    has_result = is_unseen = False
    for at, block in blocks:
        num_lost = builder.lost.total()
        if kind_of(block) == "tool_result":
            has_result = True
            _result(builder, block, at)
        else:
            try:
                text = text_of([block], at)
                if name := note_of(text):
                    builder.lost[f"injected: {name}"] += 1
                    continue
                texts.append(text)
            except Unreadable as error:
                problem = problem or error
                builder.lost[kind_of(block)] += 1
        is_unseen = is_unseen or builder.lost.total() > num_lost
    text = "\n".join(part for part in texts if part)
    if text or (is_unseen and not has_result):
        builder.user(text, is_unseen=is_unseen)
    elif is_unseen:
        builder.unseen()
    return problem


def _result(builder: Builder, block: dict[str, Any], at: str) -> None:
    try:
        text = text_of(block.get("content"), f"{at}.content", builder.lost)
    except Unreadable:  # an image: the call was answered, by something that we cannot show
        text = "[not text]"
    if block.get("is_error") and not text.lower().startswith("error"):
        text = f"Error: {text}"  # OpenAI's tool messages have no other place for it
    builder.result(text, block.get("tool_use_id"))


def _reply(builder: Builder, blocks: list[Block], key: str) -> Unreadable | None:
    text: list[str] = []
    for at, block in blocks:
        try:
            match kind := kind_of(block):
                case "tool_use":
                    builder.call(block.get("name"), block.get("input"), block.get("id"), at, key)
                case "thinking":
                    builder.think(as_string(block.get("thinking"), f"{at}.thinking"), key)
                case "redacted_thinking":
                    builder.lost[kind] += 1  # encrypted
                case _:
                    text.append(text_of([block], at))
        except Unreadable:
            builder.lost[kind_of(block)] += 1
    builder.say("".join(text), key)
    return None


def _tool(raw: dict[str, Any]) -> dict[str, Any]:
    names = {"name": "name", "description": "description", "input_schema": "parameters"}
    return {"type": "function", "function": {new: raw[old] for old, new in names.items() if old in raw}}
