"""OpenAI chat messages: {"messages": [{"role", "content", "tool_calls", ...}], "tools": [...]}."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from apollo_curation.logs.readers.builder import UNSEEN
from apollo_curation.logs.readers.injected import command_in, is_observation, note_of, without_head
from apollo_curation.logs.readers.text import (
    RawChat,
    Unreadable,
    as_list,
    as_object,
    as_string,
    text_of,
    tool_call,
    tool_list,
)
from apollo_ipc.wire.requests import Message

KEYS = ("messages", "conversations", "conversation", "traj")  # the last two: LMSYS and WildChat, tau-bench


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable where there is no list of messages."""
    key = next((key for key in KEYS if record.get(key) is not None), "messages")
    chat = read_messages(as_list(record.get(key), key), key)
    tools = tool_list(record.get("tools"), "tools") or _functions(record)
    return msgspec.structs.replace(chat, tools=tools)


def is_line(record: dict[str, Any]) -> bool:
    """Of a conversation that is logged a message a line."""
    return isinstance(record.get("role"), str) and "content" in record and "messages" not in record


class Session:
    def __init__(self) -> None:
        self._raw: list[dict[str, Any]] = []

    def accepts(self, record: dict[str, Any]) -> bool:
        return is_line(record)

    def add(self, record: dict[str, Any], at: str) -> bool:
        self._raw.append(record)
        return record["role"] == "user"

    def chats(self) -> list[RawChat]:
        return [read_messages(self._raw, "line")]

    def keep_from_prompt(self, num_prompts: int) -> None:
        prompts = [i for i, raw in enumerate(self._raw) if raw["role"] == "user"]
        if len(prompts) > num_prompts:
            del self._raw[: prompts[-num_prompts]]


def read_messages(raw_messages: list[Any], at: str) -> RawChat:
    """Each message by itself: one that cannot be read is lost, with what depends on it."""
    messages: list[Message] = []
    lost, gone, problem = Counter[str](), set[int](), None
    legacy_id: str | None = None  # of the function_call that the next function message answers
    is_unseen = False
    for i, raw in enumerate(raw_messages):
        num_lost = lost.total()
        try:
            message = _message(as_object(raw, f"{at}[{i}]"), f"{at}[{i}]", lost)
        except Unreadable as error:
            problem = problem or error
            if lost.total() == num_lost:
                lost[error.reason] += 1
            role = raw.get("role") if isinstance(raw, dict) else None
            if isinstance(role, str):
                gone.add(len(messages))
                messages.append(Message(role, "", tool_call_id=_id(raw.get("tool_call_id"))))
            continue
        if message.role == "user":
            is_unseen = False
            if name := note_of(message.content):
                lost[f"injected: {name}"] += 1
                continue
            message = _observed(messages, message)
        is_unseen = is_unseen or (lost.total() > num_lost and message.role != "assistant")
        if message.role == "assistant" and is_unseen and message.weight != 0:
            lost[UNSEEN] += 1
            message = msgspec.structs.replace(message, weight=0)
        if raw.get("function_call") is not None and message.role == "assistant" and not message.tool_calls:
            legacy_id = f"call_{i}"
            call = _call({"function": raw["function_call"], "id": legacy_id}, f"{at}[{i}].function_call")
            message = Message("assistant", message.content, tool_calls=[call])
        elif message.role == "function":
            message = Message("tool", message.content, name=message.name, tool_call_id=legacy_id)
        messages.append(message)
    return RawChat(messages, lost=lost, gone=gone, problem=problem)


def _observed(messages: list[Message], message: Message) -> Message:
    """What came of an agent's command is a tool's message, and the command that it follows a call."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or last.tool_calls or not is_observation(message.content):
        return message
    said, command = command_in(last.content) or ("", last.content)
    call = tool_call("bash", {"command": command}, None, "command")
    messages[-1] = msgspec.structs.replace(last, content=said, tool_calls=[call])
    return Message("tool", without_head(message.content))


def _message(raw: dict[str, Any], at: str, lost: Counter[str]) -> Message:
    role = as_string(raw.get("role"), f"{at}.role")
    content = text_of(raw.get("content"), f"{at}.content", lost)
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


def _id(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _call(raw: Any, at: str) -> dict[str, Any]:
    function = as_object(as_object(raw, at).get("function"), f"{at}.function")
    return tool_call(function.get("name"), function.get("arguments"), raw.get("id"), at)


def _functions(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`functions`, which `tools` replaced."""
    functions = tool_list(record.get("functions"), "functions")
    return functions and [{"type": "function", "function": function} for function in functions]
