"""One entry of a file as a conversation: its format is recognised, whatever is wrong with it is named."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from apollo_curation.logs.conversation import Broken, Conversation, Feedback, Origin, find_problem, text_hash
from apollo_curation.logs.mend import is_empty, mend
from apollo_curation.logs.readers.documents import BOM, is_message_list
from apollo_curation.logs.readers.files import stem
from apollo_curation.logs.readers.formats import read_chats
from apollo_curation.logs.readers.settle import settle
from apollo_curation.logs.readers.text import RawChat, Unreadable, name_of
from apollo_curation.logs.strip import Prune, PruneFailed, Removed, whole_text

MAX_TOPIC_CHARS = 200


def parse_record(record: Any, source: Origin, prune: Prune | None = None) -> list[Conversation | Broken]:
    """The conversations of a decoded record: one, as a rule."""
    try:
        if isinstance(record, list) and is_message_list(record):
            has_parts = any(isinstance(one, dict) and "parts" in one for one in record)
            record = {"contents" if has_parts else "messages": record}
        if not isinstance(record, dict):
            raise Unreadable("unknown_format", f"the record is {name_of(record)}; an object is needed")
        removed = prune(record) if prune else []
        topic = topic_of(record) or stem(source.path)
        found = [finish(chat, source, topic, removed) for chat in read_chats(record)]
        return [_with_feedback(one, record) for one in found]
    except Unreadable as error:
        return [Broken(source, error.reason, str(error))]
    except PruneFailed as error:
        return [Broken(source, "rule_failed", str(error))]
    except RecursionError:
        return [Broken(source, "too_deep", "nested too deeply")]


def _with_feedback(found: Conversation | Broken, record: dict[str, Any]) -> Conversation | Broken:
    said = record.get("feedback")
    if not isinstance(found, Conversation) or not isinstance(said, dict) or "completion_id" not in record:
        return found
    kept = {name: said[name] for name in ("rating", "correction") if isinstance(said.get(name), str)}
    return msgspec.structs.replace(found, feedback=Feedback(**kept)) if kept else found


def finish(chat: RawChat, source: Origin, topic: str, removed: list[Removed]) -> Conversation | Broken:
    """A valid conversation of what was read, or why there is none."""
    hashes = [part.hash for part in removed]
    if removed:
        gone = [i for i, message in enumerate(chat.messages) if is_empty(message)]
        messages, dropped = mend(chat.messages, [*gone, *chat.gone])
        hashes += [text_hash(whole_text(message)) for message, _ in dropped]
        chat = msgspec.structs.replace(chat, messages=messages, gone=set())
    messages, lost = settle(chat)
    if not any(message.role == "assistant" for message in messages) and (lost or not messages):
        if chat.problem is not None:
            return Broken(source, chat.problem.reason, str(chat.problem))
        names = ", ".join(f"{num} {name}" for name, num in lost.most_common()) or "nothing"
        return Broken(source, "empty", f"no answer is left; left out: {names}", dict(lost))
    assert find_problem(messages) is None, find_problem(messages)
    return Conversation(messages, source, topic, chat.tools, hashes, dict(lost))


def decode(data: bytes, offset: int) -> Any:
    """The JSON value; `offset` is where it stands in its file. Raises Unreadable."""
    body = data.removeprefix(BOM) if offset == 0 else data
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        try:
            text = data.decode()
        except UnicodeDecodeError as wrong:
            at = offset + wrong.start
            found = f"byte {at} of the file (0x{data[wrong.start]:02x}) is not UTF-8"
            raise Unreadable("not_utf8", f"{found}; `iconv -t UTF-8` converts it") from None
        if (lenient := _as_python_writes_it(text.removeprefix("\ufeff"))) is not None:
            return lenient
        advice = ""
        if body.strip() in (b"{", b"["):  # pretty-printed JSON
            advice = "; in JSONL a record is one line (`jq -c .` makes it so, `jq -c '.[]'` out of an array)"
        raise Unreadable("not_json", f"not JSON: {error}{advice}") from None


def _as_python_writes_it(text: str) -> Any:
    """With NaN, infinities and half a surrogate pair, which is replaced; None where it is no JSON even so."""
    try:
        written = json.dumps(json.loads(text), ensure_ascii=False)
    except ValueError:
        return None
    return json.loads(written.encode("utf-8", "replace"))


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
