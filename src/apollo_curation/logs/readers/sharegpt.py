"""ShareGPT: {"conversations": [{"from": "human", "value": "..."}, ...]}, with both ways of calling tools.

A turn `function_call` holds the call as JSON; in Hermes' way the call stands in the answer, between
<tool_call> and </tool_call>, and results between <tool_response> and </tool_response>.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import msgspec

from apollo_curation.logs.readers.text import (
    RawChat,
    Unreadable,
    as_list,
    as_object,
    as_string,
    tool_call,
    tool_list,
)
from apollo_ipc.wire.requests import Message

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    key = "conversations" if "conversations" in record else "messages"
    turns = as_list(record.get(key), key)
    messages: list[Message] = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append(Message("system", record["system"]))
    lost, gone, problem = Counter[str](), set[int](), None
    for i, raw in enumerate(turns):
        at = f"{key}[{i}]"
        try:
            messages += _turn(raw, turns[i + 1] if i + 1 < len(turns) else None, at)
        except Unreadable as error:
            problem = problem or error
            lost[error.reason] += 1
            if isinstance(raw, dict) and isinstance(raw.get("from"), str):
                gone.add(len(messages))
                speaker: str = raw["from"]
                messages.append(Message(ROLES.get(speaker.lower(), speaker), ""))
    return RawChat(messages, tool_list(record.get("tools"), "tools"), lost, gone, problem)


def _turn(raw: Any, following: Any, at: str) -> list[Message]:
    speaker = as_string(as_object(raw, at).get("from"), f"{at}.from")
    value = as_string(raw.get("value"), f"{at}.value")
    role: str = ROLES.get(speaker.lower(), speaker)
    if speaker == "function_call" and value:
        return [Message("assistant", "", tool_calls=_calls([value], at))]
    if role == "assistant" and _is_result(following) and (found := _CALL.findall(value)):
        return [Message(role, _CALL.sub("", value).strip(), tool_calls=_calls(found, at))]
    if role == "tool":
        return [Message(role, text) for text in _RESPONSE.findall(value) or [value]]
    return [Message(role, value, weight=0 if role == "assistant" and raw.get("weight") == 0 else None)]


def _is_result(turn: Any) -> bool:
    return isinstance(turn, dict) and ROLES.get(str(turn.get("from"))) == "tool"


def _calls(texts: list[str], at: str) -> list[dict[str, Any]]:
    """Each text is one call {"name", "arguments"} or a list of them."""
    calls = []
    for text in texts:
        try:
            found = msgspec.json.decode(text)
        except msgspec.DecodeError:
            raise Unreadable("wrong_type", f"{at}: the tool call is not JSON: {text[:60]!r}") from None
        for raw in found if isinstance(found, list) else [found]:
            call = as_object(raw, f"{at}: the tool call")
            calls.append(tool_call(call.get("name"), call.get("arguments"), None, at))
    return calls
