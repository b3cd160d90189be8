"""Gemini: sessions of its command line (one object, or a line a message), and `contents` of its API."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.injected import note_of
from apollo_curation.logs.readers.text import (
    RawChat,
    Unreadable,
    as_list,
    as_object,
    kind_of,
    of_another_kind,
    tool_call,
)

SPEAKERS = ("user", "gemini")


def is_session(record: dict[str, Any]) -> bool:
    messages = record.get("messages")
    return "sessionId" in record and isinstance(messages, list) and not any(map(_has_role, messages))


def is_contents(record: dict[str, Any]) -> bool:
    contents = record.get("contents")
    return isinstance(contents, list) and any(isinstance(one, dict) and "parts" in one for one in contents)


def is_line(record: dict[str, Any]) -> bool:
    """Of a session that is logged line by line: its head, or a message."""
    if "messages" in record:
        return False
    return ("sessionId" in record and "projectHash" in record) or (
        record.get("type") in SPEAKERS and {"id", "timestamp", "content"} <= record.keys()
    )


class Session:
    """Lines of an id replace earlier ones; $rewindTo takes back that message and all behind it."""

    def __init__(self) -> None:
        self._messages: dict[str, dict[str, Any]] = {}
        self._num_taken_back = 0

    def accepts(self, record: dict[str, Any]) -> bool:
        return bool({"$set", "$patch", "$rewindTo", "type"} & record.keys())

    def add(self, record: dict[str, Any], at: str) -> bool:
        """Whether it is a user's prompt."""
        if isinstance(target := record.get("$rewindTo"), str):
            ids = list(self._messages)
            start = ids.index(target) if target in self._messages else 0
            self._num_taken_back += len(ids) - start
            for name in ids[start:]:
                del self._messages[name]
        elif isinstance(record.get("id"), str) and "type" in record:
            self._messages[record["id"]] = record
            return record["type"] == "user"
        return False

    def chats(self) -> list[RawChat]:
        chat = read_session({"messages": list(self._messages.values())})
        chat.lost.update({"other branch": self._num_taken_back} if self._num_taken_back else {})
        return [chat]

    def keep_from_prompt(self, num_prompts: int) -> None:
        ids = [name for name, message in self._messages.items() if message["type"] == "user"]
        for name in list(self._messages):
            if name == ids[-num_prompts:][0]:
                break
            del self._messages[name]
        self._num_taken_back = 0


def read_session(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    builder = Builder()
    _read_each(builder, record, "messages", _message)
    return builder.chat()


def read_contents(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    builder = Builder()
    instruction = record.get("systemInstruction") or record.get("system_instruction")
    if isinstance(instruction, dict):
        builder.system(_parts(builder, instruction.get("parts"), "systemInstruction")[0])
    _read_each(builder, record, "contents", _content)
    return builder.chat()


def _read_each(
    builder: Builder, record: dict[str, Any], name: str, read: Callable[[Builder, dict[str, Any], str], None]
) -> None:
    """One that cannot be read costs itself, and is counted."""
    for i, raw in enumerate(as_list(record.get(name), name)):
        at = f"{name}[{i}]"
        try:
            with of_another_kind():
                read(builder, as_object(raw, at), at)
        except Unreadable as error:
            builder.lost[error.reason] += 1


def _message(builder: Builder, message: dict[str, Any], at: str) -> None:
    match message.get("type"):
        case "user":
            _user(builder, message.get("content"), at)
        case "gemini" | "model":
            _reply(builder, message, at)
        case other:
            builder.lost[str(other)] += 1


def _content(builder: Builder, content: dict[str, Any], at: str) -> None:
    if content.get("role") == "model":
        for k, part in enumerate(as_list(content.get("parts"), f"{at}.parts")):
            call = part.get("functionCall") if isinstance(part, dict) else None
            if isinstance(call, dict):
                builder.call(call.get("name"), call.get("args"), call.get("id"), f"{at}.parts[{k}]")
            elif isinstance(part, dict) and part.get("thought"):
                builder.think(str(part.get("text") or ""))
            else:
                builder.say(_parts(builder, [part], at)[0])
        return
    responses = [
        part["functionResponse"]
        for part in content.get("parts") or []
        if isinstance(part, dict) and isinstance(part.get("functionResponse"), dict)
    ]
    for response in responses:
        builder.result(_written(response.get("response")), response.get("id"))
    if not responses:
        _user(builder, content.get("parts"), at)


def _user(builder: Builder, content: Any, at: str) -> None:
    text, is_unseen = _parts(builder, content, at)
    if name := note_of(text):
        builder.lost[f"injected: {name}"] += 1
    else:
        builder.user(text, is_unseen=is_unseen)


def _reply(builder: Builder, message: dict[str, Any], at: str) -> None:
    key = str(message.get("id"))
    for thought in message.get("thoughts") or []:
        if isinstance(thought, dict):
            builder.think(f"{thought.get('subject', '')}: {thought.get('description', '')}", key)
    builder.say(_parts(builder, message.get("content"), at)[0], key)
    results: list[tuple[str, Any]] = []
    for k, call in enumerate(message.get("toolCalls") or []):
        where = f"{at}.toolCalls[{k}]"
        made = tool_call(as_object(call, where).get("name"), call.get("args"), call.get("id"), where)
        builder.call(made["function"]["name"], made["function"]["arguments"], made.get("id"), where, key)
        results.append((_result(builder, call, where), made.get("id")))
    for text, call_id in results:
        builder.result(text, call_id)


def _result(builder: Builder, call: dict[str, Any], at: str) -> str:
    found = call.get("result")
    parts = found if isinstance(found, list) else [found]
    texts = []
    for part in parts:
        response = part.get("functionResponse") if isinstance(part, dict) else None
        texts.append(
            _written(response.get("response")) if isinstance(response, dict) else _parts(builder, part, at)[0]
        )
    text = "\n".join(texts)
    is_failed = call.get("status") in ("error", "cancelled") and not text.lower().startswith("error")
    return f"Error: {text}" if is_failed else text


def _written(response: Any) -> str:
    if isinstance(response, dict):
        inner = response.get("output", response.get("result"))
        if isinstance(inner, str):
            return inner
        if isinstance(response.get("error"), str):
            return f"Error: {response['error']}"
    return response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)


def _parts(builder: Builder, content: Any, at: str) -> tuple[str, bool]:
    """The text, and whether something else was there."""
    parts = content if isinstance(content, list) else [content]
    texts, is_unseen = [], False
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part is not None:
            known = ("inlineData", "fileData", "executableCode", "codeExecutionResult")
            name = next((key for key in known if isinstance(part, dict) and key in part), kind_of(part))
            builder.lost[name] += 1
            is_unseen = True
    return "\n".join(texts), is_unseen


def _has_role(message: Any) -> bool:
    return isinstance(message, dict) and "role" in message
