"""Watching traffic (`serve --learn-from-traffic`): finished chat completions go to a spool.

An ASGI layer around the whole app. On the event loop it only keeps references to the bytes that pass;
decoding and writing are a thread's (spool.py). Of a streamed answer the pieces are put together; an answer
that was not finished (an error, a client that went away) is not recorded.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apollo_ipc.keys import keys_equal
from apollo_router.spool import Spool

PATH = "/v1/chat/completions"
OPT_OUT = "x-apollo-learn"  # `no`: this request is not recorded
MAX_EXCHANGE_BYTES = 8 * 1024 * 1024  # of request and answer together; a longer one is not recorded


class TrafficRecorder:
    """unrecorded_key: requests with this key are never recorded; empty for none."""

    def __init__(self, app: ASGIApp, spool: Spool, unrecorded_key: str):
        self._app, self._spool, self._unrecorded_key = app, spool, unrecorded_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", "").rstrip("/"))
        if scope["type"] != "http" or scope["method"] != "POST" or path != PATH or not self._may(scope):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange()

        async def hear() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                exchange.keep(exchange.asked, message.get("body", b""))
            return message

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            elif message["type"] == "http.response.body":
                exchange.keep(exchange.answered, message.get("body", b""))
                if not message.get("more_body"):
                    exchange.is_finished = True
            await send(message)

        await self._app(scope, hear, tell)
        if exchange.is_finished and exchange.status == 200 and not exchange.is_too_long:
            self._spool.take(exchange)

    def _may(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        if headers.get(OPT_OUT, "").strip().lower() in ("no", "false", "0"):
            return False
        given = headers.get("authorization", "").partition(" ")[2].strip()
        return not (self._unrecorded_key and given and keys_equal(given, self._unrecorded_key))


class _Exchange:
    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.answered: list[bytes] = []
        self.num_bytes = 0
        self.status = 0
        self.is_finished = self.is_too_long = False

    def keep(self, chunks: list[bytes], chunk: bytes) -> None:
        self.num_bytes += len(chunk)
        if self.num_bytes > MAX_EXCHANGE_BYTES:
            self.is_too_long = True
            self.asked, self.answered = [], []
        elif not self.is_too_long:
            chunks.append(chunk)

    def record(self) -> dict[str, Any] | None:
        """As OpenAI's fine-tuning form has it, with `completion_id`; None where there is no whole answer."""
        request = msgspec.json.decode(b"".join(self.asked))
        answered = b"".join(self.answered)
        whole = joined(answered) if answered.startswith(b"data:") else msgspec.json.decode(answered)
        choices = [one for one in (whole or {}).get("choices") or [] if one.get("index", 0) == 0]
        if whole is None or not choices or not isinstance(request.get("messages"), list):
            return None
        kept = ("role", "content", "tool_calls", "reasoning_content", "reasoning", "refusal")
        said = choices[0]["message"]
        answer = {name: said[name] for name in kept if said.get(name)} | {"role": "assistant"}
        if not answer.keys() & {"content", "tool_calls"}:
            return None
        if choices[0].get("finish_reason") == "length":
            answer["weight"] = 0  # it breaks off: seen, not to be learned
        record: dict[str, Any] = {"completion_id": whole.get("id"), "created": whole.get("created")}
        record["messages"] = [*map(_without_data, request["messages"]), answer]
        if request.get("tools"):
            record["tools"] = request["tools"]
        return record


def joined(answered: bytes) -> dict[str, Any] | None:
    """The completion that server-sent events tell piece by piece; None where they do not come to an end."""
    message: dict[str, Any] = {"role": "assistant"}
    calls: dict[int, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    finish_reason = None
    for line in answered.splitlines():
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        event = msgspec.json.decode(data)
        if "error" in event:
            return None
        whole = whole or {"id": event.get("id"), "created": event.get("created")}
        for choice in event.get("choices") or []:
            if choice.get("index", 0) != 0:
                continue
            finish_reason = choice.get("finish_reason") or finish_reason
            delta = choice.get("delta") or {}
            for name in ("content", "reasoning_content", "reasoning", "refusal"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for piece in delta.get("tool_calls") or []:
                call = calls.setdefault(
                    piece.get("index", 0), {"type": "function", "function": {"name": "", "arguments": ""}}
                )
                if piece.get("id"):
                    call["id"] = piece["id"]
                function = piece.get("function") or {}
                call["function"]["name"] += function.get("name") or ""
                call["function"]["arguments"] += function.get("arguments") or ""
    if finish_reason is None:
        return None
    if calls:
        message["tool_calls"] = [calls[i] for i in sorted(calls)]
    return {**whole, "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


def _without_data(message: Any) -> Any:
    """An image or a sound is only named: whoever reads the spool knows that something stood there."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    texts = ("text", "refusal", "input_text", "output_text")
    parts = [
        {"type": part.get("type")} if isinstance(part, dict) and part.get("type") not in texts else part
        for part in content
    ]
    return {**message, "content": parts}
