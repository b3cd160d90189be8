"""The export of Claude.ai: {"chat_messages": [{"sender", "text", "content": [blocks]}]}, and where messages
name their parents, the branch that is current."""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.chatgpt import branch
from apollo_curation.logs.readers.text import (
    RawChat,
    Unreadable,
    as_list,
    as_object,
    kind_of,
    of_another_kind,
    text_of,
)


def is_record(record: dict[str, Any]) -> bool:
    return isinstance(record.get("chat_messages"), list)


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    raw = as_list(record.get("chat_messages"), "chat_messages")
    builder = Builder()
    for i in _current(raw, record.get("current_leaf_message_uuid"), builder):
        at = f"chat_messages[{i}]"
        try:
            with of_another_kind():
                _add(builder, as_object(raw[i], at), at)
        except Unreadable as error:
            builder.lost[error.reason] += 1
    return builder.chat()


def _current(raw: list[Any], leaf: Any, builder: Builder) -> list[int]:
    by_id = {
        message["uuid"]: i
        for i, message in enumerate(raw)
        if isinstance(message, dict) and isinstance(message.get("uuid"), str)
    }
    nodes = {name: raw[i] for name, i in by_id.items()}
    if len(by_id) < len(raw) or not any(node.get("parent_message_uuid") in nodes for node in nodes.values()):
        return list(range(len(raw)))
    path = branch(nodes, leaf, "parent_message_uuid")
    builder.lost.update({"other branch": len(raw) - len(path)} if len(path) < len(raw) else {})
    return [by_id[name] for name in path]


def _add(builder: Builder, message: dict[str, Any], at: str) -> None:
    content = message.get("content")
    blocks = (
        content if isinstance(content, list) and content else [{"type": "text", "text": message.get("text")}]
    )
    if message.get("sender") == "human":
        num_lost = builder.lost.total()
        for name in ("attachments", "files", "files_v2"):
            if message.get(name):
                builder.lost[name.removesuffix("_v2")] += len(message[name])
        texts = []
        for block in blocks:
            if kind_of(block) == "text":
                texts.append(str(block.get("text") or ""))
            else:
                builder.lost[kind_of(block)] += 1
        builder.user("\n".join(texts), is_unseen=builder.lost.total() > num_lost)
        return
    for i, block in enumerate(blocks):
        where = f"{at}.content[{i}]"
        match kind := kind_of(block):
            case "text":
                builder.say(str(block.get("text") or ""))
            case "thinking":
                builder.think(str(block.get("thinking") or ""))
            case "tool_use":
                builder.call(block.get("name"), block.get("input"), block.get("id"), where)
            case "tool_result":
                try:
                    text = text_of(block.get("content"), where, builder.lost)
                except Unreadable:
                    text = "[not text]"
                builder.result(text, block.get("tool_use_id"))
            case _:
                builder.lost[kind] += 1
