"""Trajectories of SWE-agent: {"trajectory", "history", "info"}; its `history` is what the model saw.

Where it called no tools, a command stands beside its thought (`action`), and the answer of the shell is the
user's message after it. (mini-swe-agent's `messages` are read as OpenAI's.)
"""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.injected import is_observation, without_head
from apollo_curation.logs.readers.text import (
    RawChat,
    Unreadable,
    as_list,
    as_object,
    of_another_kind,
    text_of,
)


def is_record(record: dict[str, Any]) -> bool:
    return isinstance(record.get("trajectory"), list) and isinstance(record.get("history"), list)


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    builder, is_awaited = Builder(), False  # the shell's answer to a command
    for i, raw in enumerate(as_list(record.get("history"), "history")):
        at = f"history[{i}]"
        try:
            with of_another_kind():
                is_awaited = _add(builder, as_object(raw, at), at, is_awaited)
        except Unreadable as error:
            builder.lost[error.reason] += 1
    return builder.chat()


def _add(builder: Builder, item: dict[str, Any], at: str, is_awaited: bool) -> bool:
    """Whether the next item is what the shell answered, whoever it says has spoken."""
    if item.get("is_demo"):
        builder.lost["demonstration"] += 1
        return is_awaited
    role = item.get("role")
    text = text_of(item.get("content"), f"{at}.content", builder.lost)
    ids = item.get("tool_call_ids") or []
    if role == "assistant":
        calls = item.get("tool_calls") or []
        action = item.get("action")
        is_command = not calls and isinstance(action, str) and action.strip()
        builder.say(str(item.get("thought") or "") if is_command else text, at)
        for call in calls:
            function = as_object(as_object(call, at).get("function"), f"{at}.function")
            builder.call(function.get("name"), function.get("arguments"), call.get("id"), at, at)
        if is_command:
            builder.call("bash", {"command": action}, None, at, at)
            return True
    elif role == "tool" or (role == "user" and (is_awaited or is_observation(text))):
        builder.result(without_head(text), ids[0] if ids else item.get("tool_call_id"))
    elif role == "user":
        builder.user(text)
    elif role == "system":
        builder.system(text)
    else:
        builder.lost[f"role {role}"] += 1
    return False
