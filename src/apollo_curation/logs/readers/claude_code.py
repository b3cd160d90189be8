"""Sessions of Claude Code: a file is one session, a line one block of a reply, a prompt, a result, or a note.

Blocks of one reply share `message.id`; lines of a subagent say `isSidechain`, and are a conversation of
their own; `parentUuid` shows where a prompt was taken back and asked anew. isMeta and isCompactSummary mark
what the user did not say.
"""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.injected import note_of
from apollo_curation.logs.readers.text import RawChat, Unreadable, as_object, as_string, kind_of, text_of


def is_line(record: dict[str, Any]) -> bool:
    if not isinstance(record.get("type"), str):
        return False
    if "sessionId" in record and "projectHash" not in record:
        return "messages" not in record
    is_snapshot = "messageId" in record and "snapshot" in record
    is_turn = record["type"] in ("user", "assistant") and isinstance(record.get("message"), dict)
    return "leafUuid" in record or is_snapshot or is_turn


class Session:
    def __init__(self) -> None:
        self._chains: dict[str, Builder] = {"": Builder()}
        self._chain_of: dict[str, str] = {}  # of lines of subagents, by uuid
        self._length_after: dict[str, int] = {}  # of the main chain, by uuid of the line
        self._prompts: dict[str, int] = {}  # where the prompt that follows a line stands

    def accepts(self, record: dict[str, Any]) -> bool:
        return isinstance(record.get("type"), str)

    def add(self, record: dict[str, Any], at: str) -> bool:
        """Whether it is a user's prompt of the main chain. Raises Unreadable."""
        kind = record["type"]
        builder = self._chains[""]
        if kind == "attachment" and isinstance(queued := record.get("attachment"), dict):
            prompt = queued.get("prompt")
            if queued.get("type") == "queued_command" and isinstance(prompt, str) and not note_of(prompt):
                builder.user(prompt)
                return True
            kind = f"attachment {queued.get('type')}"
        if kind not in ("user", "assistant") or "message" not in record:
            builder.lost[kind] += 1
            return False
        builder = self._chain(record)
        for mark in ("isMeta", "isCompactSummary", "isApiErrorMessage", "isVisibleInTranscriptOnly"):
            if record.get(mark):
                builder.lost[mark] += 1
                return False
        message = as_object(record["message"], f"{at}.message")
        if kind == "assistant":
            self._reply(builder, message, f"{at}.message")
            is_prompt = False
        else:
            is_prompt = self._said(builder, record, message, f"{at}.message")
        if builder is self._chains[""] and isinstance(record.get("uuid"), str):
            self._length_after[record["uuid"]] = len(builder)
        return is_prompt and builder is self._chains[""]

    def chats(self) -> list[RawChat]:
        return [builder.chat() for builder in self._chains.values() if len(builder) or builder.lost]

    def keep_from_prompt(self, num_prompts: int) -> None:
        main = self._chains[""]
        main.keep_from_prompt(num_prompts)
        self._chains = {"": main}
        for known in (self._chain_of, self._length_after, self._prompts):
            known.clear()  # positions have moved

    def _chain(self, record: dict[str, Any]) -> Builder:
        if not record.get("isSidechain"):
            return self._chains[""]
        parent, uuid = record.get("parentUuid"), str(record.get("uuid"))
        name = record.get("agentId") or self._chain_of.get(str(parent), uuid)
        self._chain_of[uuid] = name
        return self._chains.setdefault(str(name), Builder())

    def _reply(self, builder: Builder, message: dict[str, Any], at: str) -> None:
        key = message.get("id")
        key = key if isinstance(key, str) else None
        content = message.get("content")
        if isinstance(content, str):
            builder.say(content, key)
            return
        for i, block in enumerate(content if isinstance(content, list) else []):
            where = f"{at}.content[{i}]"
            match kind := kind_of(block):
                case "text":
                    builder.say(as_string(block.get("text"), f"{where}.text"), key)
                case "thinking":
                    builder.think(str(block.get("thinking") or ""), key)
                case "tool_use":
                    builder.call(block.get("name"), block.get("input"), block.get("id"), where, key)
                case _:
                    builder.lost[kind] += 1

    def _said(self, builder: Builder, record: dict[str, Any], message: dict[str, Any], at: str) -> bool:
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list):
            raise Unreadable("wrong_type", f"{at}.content is neither text nor a list of blocks")
        texts: list[str] = []
        num_lost, has_result = builder.lost.total(), False
        for i, block in enumerate(blocks):
            kind = kind_of(block)
            if kind == "tool_result":
                has_result = True
                self._result(builder, block, f"{at}.content[{i}]")
            elif kind == "text" and isinstance(block.get("text"), str):
                if name := note_of(block["text"]):
                    builder.lost[f"injected: {name}"] += 1
                    num_lost += 1
                else:
                    texts.append(block["text"])
            else:
                builder.lost[kind] += 1
        is_unseen = builder.lost.total() > num_lost
        if has_result or not (texts or is_unseen):
            if is_unseen:
                builder.unseen()
            if texts:  # beside results a program speaks, or the user between two calls
                builder.user("\n".join(texts), is_unseen=is_unseen)
            return False
        self._take_back(builder, record.get("parentUuid"))
        builder.user("\n".join(texts), is_unseen=is_unseen)
        return True

    def _take_back(self, builder: Builder, parent: Any) -> None:
        """A second prompt behind the same line takes the place of the first one, and of all that followed."""
        if builder is not self._chains[""] or not isinstance(parent, str):
            return
        if parent in self._prompts and self._length_after.get(parent, -1) == self._prompts[parent]:
            builder.cut(self._prompts[parent])
        self._prompts[parent] = len(builder)

    def _result(self, builder: Builder, block: dict[str, Any], at: str) -> None:
        try:
            text = text_of(block.get("content"), f"{at}.content", builder.lost)
        except Unreadable:  # an image: the call was answered, by something that we cannot show
            text = "[not text]"
        if block.get("is_error") and not text.lower().startswith("error"):
            text = f"Error: {text}"
        builder.result(text, block.get("tool_use_id"))
