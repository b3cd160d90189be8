"""Events of OpenHands: actions and observations, one after the other, of either generation.

First: {"source", "action", "args"} and {"observation", "content", "cause"}, in a list, in lines, or as
`history` of a record. Second (its SDK): {"kind": "MessageEvent" | "ActionEvent" | "ObservationEvent" | ...}.
"""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers.builder import Builder
from apollo_curation.logs.readers.text import (
    RawChat,
    Unreadable,
    as_object,
    as_string,
    embedded,
    of_another_kind,
    text_of,
)

SAID = {"message": "content", "finish": "final_thought", "think": "thought", "reject": "reason"}


def is_line(record: dict[str, Any]) -> bool:
    if isinstance(record.get("kind"), str) and "source" in record:
        return record["kind"].endswith(("Event", "Observation", "Condensation", "CondensationRequest"))
    is_action = isinstance(record.get("action"), str) and "source" in record
    return is_action or (isinstance(record.get("observation"), str) and "content" in record)


def is_record(record: dict[str, Any]) -> bool:
    events = _events(record)
    return bool(events) and is_line(events[0])


def read_chat(record: dict[str, Any]) -> RawChat:
    session = Session()
    for i, event in enumerate(_events(record)):
        try:
            with of_another_kind():
                session.add(event, f"history[{i}]")
        except Unreadable as error:
            session.builder.lost[error.reason] += 1
    return session.builder.chat()


def _events(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Older files hold pairs of action and observation."""
    history = record.get("history")
    if not isinstance(history, list):
        return []
    flat = [event for entry in history for event in (entry if isinstance(entry, list) else [entry])]
    return [event for event in flat if isinstance(event, dict)]


class Session:
    def __init__(self) -> None:
        self.builder = Builder()

    def accepts(self, record: dict[str, Any]) -> bool:
        return bool({"kind", "action", "observation"} & record.keys())

    def add(self, record: dict[str, Any], at: str) -> bool:
        """Whether it is a user's prompt. Raises Unreadable."""
        event = record
        if isinstance(event.get("kind"), str):
            return self._second(event, at)
        if isinstance(event.get("observation"), str):
            if event["observation"] in ("agent_state_changed", "null", "recall"):
                self.builder.lost[event["observation"]] += 1
            else:
                self.builder.result(text_of(event.get("content"), at, self.builder.lost), _id(event, "cause"))
            return False
        return self._action(event, at)

    def chats(self) -> list[RawChat]:
        return [self.builder.chat()]

    def keep_from_prompt(self, num_prompts: int) -> None:
        self.builder.keep_from_prompt(num_prompts)

    def _action(self, event: dict[str, Any], at: str) -> bool:
        kind, source = as_string(event.get("action"), f"{at}.action"), event.get("source")
        args = as_dict(event.get("args"))
        if kind == "system":
            self.builder.system(str(args.get("content") or ""))
        elif kind in ("recall", "change_agent_state", "null", "condensation", "condensation_request"):
            self.builder.lost[kind] += 1
        elif source == "user":
            is_unseen = bool(args.get("image_urls"))
            self.builder.lost.update({"image": len(args["image_urls"])} if is_unseen else {})
            self.builder.user(str(args.get("content") or event.get("message") or ""), is_unseen=is_unseen)
            return True
        elif kind in SAID:
            said = args.get(SAID[kind]) or args.get("content") or event.get("message") or ""
            (self.builder.think if kind == "think" else self.builder.say)(str(said))
        else:
            self.builder.say(str(args.get("thought") or ""))
            name, arguments = _called(event, kind, args)
            self.builder.call(name, arguments, _id(event, "id"), at)
        return False

    def _second(self, event: dict[str, Any], at: str) -> bool:
        builder, kind = self.builder, event["kind"]
        match kind:
            case "SystemPromptEvent":
                builder.system(text_of([event.get("system_prompt")], at, builder.lost))
            case "MessageEvent":
                message = as_object(event.get("llm_message"), f"{at}.llm_message")
                num_lost = builder.lost.total()
                text = text_of(message.get("content"), f"{at}.llm_message.content", builder.lost)
                if event.get("source") == "user":
                    builder.user(text, is_unseen=builder.lost.total() > num_lost)
                    return True
                builder.say(text)
            case "ActionEvent":
                key = event.get("llm_response_id")
                builder.think(str(event.get("reasoning_content") or ""), key)
                builder.say(text_of(event.get("thought"), at, builder.lost), key)
                call = as_dict(event.get("tool_call"))
                function = as_dict(call.get("function")) or call
                call_id = event.get("tool_call_id") or call.get("id")
                name = event.get("tool_name") or function.get("name")
                builder.call(name, function.get("arguments"), call_id, at, key)
            case "ObservationEvent" | "AgentErrorEvent" | "UserRejectObservation":
                found = event.get("observation")
                content = found.get("content") or found.get("output") if isinstance(found, dict) else found
                content = content or event.get("error") or event.get("rejection_reason")
                builder.result(text_of(content, at, builder.lost), event.get("tool_call_id"))
            case _:
                builder.lost[kind] += 1
        return False


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _id(event: dict[str, Any], name: str) -> str | None:
    return None if event.get(name) is None else f"event_{event[name]}"


def _called(event: dict[str, Any], kind: str, args: dict[str, Any]) -> tuple[str, Any]:
    """As the model called it, where that was kept; else the action and its arguments."""
    metadata = event.get("tool_call_metadata")
    own = {
        name: value for name, value in args.items() if name not in ("thought", "hidden", "confirmation_state")
    }
    if not isinstance(metadata, dict) or not isinstance(metadata.get("function_name"), str):
        return kind, own
    try:
        calls = metadata["model_response"]["choices"][0]["message"]["tool_calls"]
        wanted = metadata.get("tool_call_id")
        call = next(call for call in calls if call.get("id") == wanted)
        return metadata["function_name"], embedded(call["function"]["arguments"])
    except (KeyError, IndexError, TypeError, StopIteration):
        return metadata["function_name"], own
