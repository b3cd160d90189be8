"""One entry of a file as a conversation: its format is recognised, whatever is wrong with it is named."""

from __future__ import annotations

from typing import Any

import msgspec

from apollo_curation.logs.conversation import Broken, Conversation, Source, find_problem, text_hash
from apollo_curation.logs.mend import is_empty, mend
from apollo_curation.logs.readers import anthropic, openai, sharegpt
from apollo_curation.logs.readers.documents import BOM, is_message_list
from apollo_curation.logs.readers.files import stem
from apollo_curation.logs.readers.text import Chat, Unreadable, name_of
from apollo_curation.logs.strip import Prune, PruneFailed, whole_text
from apollo_ipc.wire.requests import Message

KNOWN_FORMS = (
    '{"messages": [...]} (OpenAI, Anthropic), {"conversations": [...]} (ShareGPT) or a list of messages'
)
MAX_TOPIC_CHARS = 200


def parse(data: bytes, source: Source, prune: Prune | None = None) -> Conversation | Broken:
    """`data`: one JSON value. prune: takes parts out of it first; what depended on them goes with them."""
    try:
        return _parse(data, source, prune)
    except Unreadable as error:
        return Broken(source, error.reason, str(error))
    except PruneFailed as error:
        return Broken(source, "rule_failed", str(error))
    except RecursionError:
        return Broken(source, "too_deep", "nested too deeply")


def _parse(data: bytes, source: Source, prune: Prune | None) -> Conversation:
    record = decode(data, source.offset)
    if isinstance(record, list) and is_message_list(record):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise Unreadable("unknown_format", f"the record is {name_of(record)}; known are {KNOWN_FORMS}")
    removed = prune(record) if prune else []
    chat = read_chat(record)
    messages = chat.messages
    hashes = [part.hash for part in removed]
    if removed:
        gone = [i for i, message in enumerate(messages) if is_empty(message)]
        messages, dropped = mend(messages, gone)
        hashes += [text_hash(whole_text(message)) for message, _ in dropped]
    _check(messages)
    return Conversation(messages, source, topic_of(record) or stem(source.path), chat.tools, hashes)


def decode(data: bytes, offset: int) -> Any:
    """The JSON value; `offset` is where it stands in its file. Raises Unreadable."""
    body = data.removeprefix(BOM) if offset == 0 else data
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        try:
            data.decode()
        except UnicodeDecodeError as wrong:
            at = offset + wrong.start
            found = f"byte {at} of the file (0x{data[wrong.start]:02x}) is not UTF-8"
            raise Unreadable("not_utf8", f"{found}; `iconv -t UTF-8` converts it") from None
        advice = ""
        if body.strip() in (b"{", b"["):  # pretty-printed JSON
            advice = "; in JSONL a record is one line (`jq -c .` makes it so, `jq -c '.[]'` out of an array)"
        raise Unreadable("not_json", f"not JSON: {error}{advice}") from None


def read_chat(record: dict[str, Any]) -> Chat:
    """By the adapter of its format. Raises Unreadable."""
    for key in ("messages", "conversations"):
        turns = record.get(key)
        if turns is None:
            continue
        if isinstance(turns, list) and not turns:
            raise Unreadable("empty", f"{key} is empty")
        if isinstance(turns, list) and isinstance(turns[0], dict) and "from" in turns[0]:
            return sharegpt.read_chat(record)
        is_list = isinstance(turns, list)
        reader = anthropic if key == "messages" and is_list and anthropic.is_anthropic(record) else openai
        return reader.read_chat(record)
    keys = ", ".join(sorted(map(repr, record))[:8]) or "none"
    raise Unreadable("unknown_format", f"its keys are {keys}; known are {KNOWN_FORMS}")


def _check(messages: list[Message]) -> None:
    if not messages:
        raise Unreadable("empty", "no message is left")
    for i, message in enumerate(messages):
        known = [call["id"] for call in message.tool_calls or [] if "id" in call]
        if len(set(known)) < len(known):
            raise Unreadable("duplicate_id", f"message {i} ({message.role}): two tool calls have the same id")
    if problem := find_problem(messages):
        raise Unreadable("not_a_conversation", problem)


def topic_of(record: dict[str, Any]) -> str | None:
    """What the record itself says: topic, project or the first of tags, there or in `metadata`."""
    metadata = record.get("metadata")
    for place in (record, metadata if isinstance(metadata, dict) else {}):
        tags = place.get("tags")
        first_tag = tags[0] if isinstance(tags, list) and tags else None
        for name in (place.get("topic"), place.get("project"), first_tag):
            if isinstance(name, str) and name.strip():
                return name.strip()[:MAX_TOPIC_CHARS]
    return None
