"""The export of ChatGPT: each conversation is a tree (`mapping`), of which the branch that ends at
`current_node` is read."""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.text import RawChat, Unreadable, as_object, kind_of, of_another_kind


def is_record(record: dict[str, Any]) -> bool:
    return isinstance(record.get("mapping"), dict)


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable where the tree has no message."""
    mapping = record["mapping"]
    path = branch(mapping, record.get("current_node"), "parent")
    builder = Builder()
    for name in path:
        message = mapping[name].get("message") if isinstance(mapping[name], dict) else None
        if isinstance(message, dict):
            try:
                with of_another_kind():
                    _add(builder, message, f"mapping.{name}")
            except Unreadable as error:
                builder.lost[error.reason] += 1
    others = [mapping[name] for name in mapping.keys() - set(path)]
    num_others = sum(1 for node in others if isinstance(node, dict) and node.get("message"))
    builder.lost.update({"other branch": num_others} if num_others else {})
    return builder.chat()


def branch(nodes: dict[str, Any], leaf: Any, parent_key: str) -> list[str]:
    """The names from the root to `leaf`, or to the last node where there is no such leaf."""
    if leaf not in nodes:
        leaf = next(reversed(nodes), None)
    path: list[str] = []
    seen: set[str] = set()
    while isinstance(leaf, str) and leaf in nodes and leaf not in seen:
        seen.add(leaf)
        path.append(leaf)
        leaf = nodes[leaf].get(parent_key) if isinstance(nodes[leaf], dict) else None
    return path[::-1]


def _add(builder: Builder, message: dict[str, Any], at: str) -> None:
    role = as_object(message.get("author"), f"{at}.author").get("role")
    content = as_object(message.get("content"), f"{at}.content")
    kind = kind_of({"type": content.get("content_type")})
    metadata = message.get("metadata") or {}
    if kind in ("thoughts", "reasoning_recap"):
        builder.lost[kind] += 1  # a summary of them, in the interface's words
        return
    text, is_unseen = _text(builder, content)
    if kind in ("user_editable_context", "model_editable_context"):
        builder.lost[kind] += 1
    elif metadata.get("is_visually_hidden_from_conversation") and role != "tool":
        if text.strip():
            builder.lost["hidden"] += 1
    elif role == "assistant":
        recipient = message.get("recipient", "all")
        if recipient not in ("all", None):
            builder.call(str(recipient), {"input": text}, None, at)
        else:
            builder.say(text)
    elif role == "tool":
        builder.result(text)
        if is_unseen:
            builder.unseen()
    elif role == "user":
        builder.user(text, is_unseen=is_unseen)
    elif role == "system":
        builder.system(text)
    else:
        builder.lost[f"role {role}"] += 1


def _text(builder: Builder, content: dict[str, Any]) -> tuple[str, bool]:
    """The text, and whether something else was there."""
    parts = content.get("parts")
    if not isinstance(parts, list):
        found = content.get("text") or content.get("result") or ""
        return (found if isinstance(found, str) else ""), False
    texts = [part for part in parts if isinstance(part, str)]
    others = [part for part in parts if not isinstance(part, str)]
    for part in others:
        name = part.get("content_type") if isinstance(part, dict) else None
        builder.lost[str(name or "part of no type")] += 1
    return "\n".join(texts), bool(others)
