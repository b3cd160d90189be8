"""Exports of tracers: Langfuse (`input`, `output`, `observations`) and LangSmith (`inputs`, `outputs`)."""

from __future__ import annotations

from typing import Any

from apollo_curation.logs.readers import openai, responses, served
from apollo_curation.logs.readers.text import RawChat, Unreadable, as_list, embedded

ROLES = {"human": "user", "ai": "assistant", "humanmessage": "user", "aimessage": "assistant"}
ROLES |= {"systemmessage": "system", "toolmessage": "tool", "aimessagechunk": "assistant", "function": "tool"}


def is_langfuse(record: dict[str, Any]) -> bool:
    if isinstance(record.get("observations"), list):
        return True
    marks = {"traceId", "trace_id", "projectId", "htmlPath", "startTime", "metadata", "type"} & record.keys()
    return "input" in record and "output" in record and bool(marks)


def is_langsmith(record: dict[str, Any]) -> bool:
    return isinstance(embedded(record.get("inputs")), dict) and "outputs" in record


def read_langfuse(record: dict[str, Any]) -> list[RawChat]:
    """A conversation for each generation of the trace; where there is none, the trace's own. Raises
    Unreadable."""
    generations = [
        one
        for one in record.get("observations") or []
        if isinstance(one, dict) and str(one.get("type", "")).upper() == "GENERATION" and one.get("input")
    ]
    return [_chat(one.get("input"), one.get("output")) for one in generations or [record]]


def read_langsmith(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    inputs, outputs = embedded(record["inputs"]), embedded(record.get("outputs"))
    known = (name for name in ("messages", "input", "question", "prompt") if name in inputs)
    asked = inputs.get(next(known, ""))
    return _chat(inputs if asked is None else asked, outputs)


def _chat(asked: Any, answered: Any) -> RawChat:
    asked, answered = embedded(asked), embedded(answered)
    if isinstance(asked, dict):
        asked = asked.get("messages", asked.get("input", asked.get("prompt", [asked])))
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    asked = as_list(asked, "input")
    while len(asked) == 1 and isinstance(asked[0], list):  # LangChain: a list of messages for each prompt
        asked = asked[0]
    if any(isinstance(one, dict) and one.get("type") in responses.ITEMS for one in asked):
        return responses.read_chat({"input": asked, "output": answered if isinstance(answered, list) else []})
    messages = [_message(one) for one in asked]
    if not any(isinstance(one, dict) and one.get("role") in ("user", "assistant") for one in messages):
        raise Unreadable("no_conversation", "its input holds no messages: a step of a program, not of a chat")
    answer = _answer(answered, len(messages))
    if isinstance(answer, list):
        return openai.read_messages([*messages, *answer], "input")
    return served.with_answer(openai.read_messages(messages, "input"), answer)


def _answer(answered: Any, num_asked: int) -> Any:
    """The response, or the messages that came after the first `num_asked`."""
    if not isinstance(answered, dict):
        return answered
    generations = answered.get("generations")
    while isinstance(generations, list) and generations:
        generations = generations[0]
    if isinstance(generations, dict):
        return _message(generations.get("message")) if generations.get("message") else generations.get("text")
    if isinstance(answered.get("messages"), list):
        messages = [_message(one) for one in answered["messages"]]
        return messages[num_asked:] if len(messages) > num_asked else messages
    if "output" in answered and not isinstance(answered["output"], list):
        return _message(answered["output"])
    return _message(answered)


def _message(raw: Any) -> Any:
    """LangChain's messages, in each form in which they are written, as OpenAI's."""
    if not isinstance(raw, dict):
        return raw
    name = raw["id"][-1] if isinstance(raw.get("id"), list) and raw["id"] else None
    own = raw.get("kwargs") or raw.get("data") or raw
    if not isinstance(own, dict) or "role" in own:
        return own
    kind = str(own.get("type") or name or raw.get("type") or "").lower()
    role = ROLES.get(str(name).lower()) or ROLES.get(kind, kind)
    if role not in ("user", "assistant", "system", "tool"):
        return raw
    message: dict[str, Any] = {"role": role, "content": own.get("content")}
    if own.get("tool_call_id"):
        message["tool_call_id"] = own["tool_call_id"]
    calls = own.get("tool_calls") or (own.get("additional_kwargs") or {}).get("tool_calls")
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
        if isinstance(message["content"], list):  # Anthropic's blocks repeat the calls
            message["content"] = [part for part in message["content"] if not _is_use(part)]
    return message


def _is_use(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "tool_use"


def _call(call: Any) -> Any:
    if not isinstance(call, dict) or "function" in call:
        return call
    return {"id": call.get("id"), "function": {"name": call.get("name"), "arguments": call.get("args")}}
