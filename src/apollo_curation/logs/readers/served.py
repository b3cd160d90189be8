"""What servers log: a request and its response, side by side.

LiteLLM's `messages` + `response`; batch files' `body` (OpenAI, vLLM) or `params` (Anthropic) + `response`;
the same with `request`. A batch's output file alone has answers without questions.
"""

from __future__ import annotations

from typing import Any

import msgspec

from apollo_curation.logs.readers import anthropic, openai, responses
from apollo_curation.logs.readers.text import RawChat, Unreadable, as_object, embedded

REQUESTS = ("body", "params", "request", "request_body", "proxy_server_request", "kwargs")
RESPONSES = ("response", "response_body", "result", "response_obj")


def is_record(record: dict[str, Any]) -> bool:
    if any(isinstance(embedded(record.get(name)), dict | str) and record.get(name) for name in RESPONSES):
        return "messages" in record or "custom_id" in record or _request(record) is not None
    return "messages" not in record and _request(record) is not None


def _request(record: dict[str, Any]) -> dict[str, Any] | None:
    for name in REQUESTS:
        found = embedded(record.get(name))
        if isinstance(found, dict) and isinstance(found.get("body"), dict):
            found = found["body"]
        if isinstance(found, dict) and ("messages" in found or "input" in found):
            return found
    return None


def read_chat(record: dict[str, Any]) -> RawChat:
    """Raises Unreadable."""
    request = _request(record)
    if request is None:
        messages = embedded(record.get("messages"))
        if not messages:
            raise Unreadable("answer_only", "it holds a response, and not the request that it answers")
        request = {**record, "messages": messages}
    elif not isinstance(embedded(request.get("messages")), list) and "input" not in request:
        raise Unreadable("wrong_type", "the request's messages are no list")
    response = next((embedded(record[name]) for name in RESPONSES if record.get(name)), None)
    if "input" in request and "messages" not in request:
        output = _inner(response).get("output") if isinstance(response, dict) else None
        return responses.read_chat({**request, "output": output or []})
    request = {**request, "messages": embedded(request["messages"])}
    reader = anthropic if anthropic.is_anthropic(request) else openai
    return with_answer(reader.read_chat(request), response)


def with_answer(chat: RawChat, response: Any) -> RawChat:
    """The chat with the first answer of `response`, in whatever form that has; one that cannot be found is
    lost by name."""
    if response is None:
        chat.lost["no response"] += 1
        return chat
    answer = answer_of(response)
    if answer is None:
        chat.lost["response without an answer"] += 1
        return chat
    choices = _inner(response).get("choices") if isinstance(response, dict) else None
    if isinstance(choices, list) and len(choices) > 1:
        chat.lost["other choice"] += len(choices) - 1
    return msgspec.structs.replace(
        chat,
        messages=[*chat.messages, *answer.messages],
        lost=chat.lost + answer.lost,
        gone=chat.gone | {len(chat.messages) + i for i in answer.gone},
    )


def answer_of(response: Any) -> RawChat | None:
    """Of a chat completion, a message of Anthropic, Responses items, a bare message, or a text."""
    response = embedded(response)
    if isinstance(response, str):
        raw = {"role": "assistant", "content": response}
        return openai.read_messages([raw], "response") if response.strip() else None
    if isinstance(response, list):
        response = {"output": response}
    if not isinstance(response, dict):
        return None
    inner = _inner(response)
    choices = inner.get("choices")
    if isinstance(choices, list) and choices:
        choice = as_object(choices[0], "response.choices[0]")
        raw = choice.get("message") or {"content": choice.get("text")}
        return openai.read_messages([{"role": "assistant", **as_object(raw, "message")}], "response.choices")
    if inner.get("type") == "message" and isinstance(inner.get("content"), list):
        return anthropic.read_chat({"messages": [{"role": "assistant", "content": inner["content"]}]})
    if isinstance(inner.get("output"), list):
        return responses.read_chat({"input": [], "output": inner["output"]})
    if "content" in inner or "tool_calls" in inner:
        return openai.read_messages([{**inner, "role": "assistant"}], "response")
    for name in ("output", "text", "answer"):
        if isinstance(inner.get(name), str):
            return answer_of(inner[name])
    return None


def _inner(response: dict[str, Any]) -> dict[str, Any]:
    """The body within what a batch, or a gateway, wraps around it."""
    for name in ("body", "message", "response"):
        found = embedded(response.get(name))
        if isinstance(found, dict) and "choices" not in response:
            return _inner(found)
    return response
