"""The export of Open WebUI: {"chat": {"history": {"messages": {id: {...}}, "currentId"}}}, a tree of which
the current branch is read."""

from __future__ import annotations

import re
from typing import Any

from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.chatgpt import branch
from apollo_curation.logs.readers.text import (
    RawChat,
    Unreadable,
    as_object,
    as_string,
    of_another_kind,
    text_of,
)

_DETAILS = re.compile(r"<details type=\"(\w+)\".*?</details>\s*", re.DOTALL)


def is_record(record: dict[str, Any]) -> bool:
    chat = record.get("chat")
    if not isinstance(chat, dict):
        return False
    return isinstance(chat.get("history"), dict) or isinstance(chat.get("messages"), list)


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    chat, builder = record["chat"], Builder()
    history = chat.get("history") or {}
    nodes = history.get("messages")
    if isinstance(nodes, dict) and nodes:
        path = branch(nodes, history.get("currentId"), "parentId")
        messages = [nodes[name] for name in path]
        builder.lost.update({"other branch": len(nodes) - len(path)} if len(path) < len(nodes) else {})
    else:
        messages = chat.get("messages") or []
    system = chat.get("system") or (chat.get("params") or {}).get("system")
    if isinstance(system, str):
        builder.system(system)
    for i, raw in enumerate(messages):
        at = f"chat.messages[{i}]"
        try:
            with of_another_kind():
                _add(builder, as_object(raw, at), at)
        except Unreadable as error:
            builder.lost[error.reason] += 1
    return builder.chat()


def _add(builder: Builder, message: dict[str, Any], at: str) -> None:
    role = as_string(message.get("role"), f"{at}.role")
    num_lost = builder.lost.total()
    text = text_of(message.get("content"), f"{at}.content", builder.lost)
    if role == "user":
        if files := message.get("files"):
            builder.lost["files"] += len(files)
        builder.user(text, is_unseen=builder.lost.total() > num_lost)
    elif role == "assistant":
        for kind in _DETAILS.findall(text):  # thoughts and calls, as the page folds them
            builder.lost[f"details {kind}"] += 1
        if message.get("error"):
            builder.lost["error"] += 1
        builder.say(_DETAILS.sub("", text))
    elif role == "system":
        builder.system(text)
    else:
        builder.lost[f"role {role}"] += 1
