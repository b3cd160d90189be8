"""An OpenAI-compatible server whose answers are written in advance: the judge of tests and demonstrations.

A tiny random model can be trained and measured, but it cannot judge. Where a person's setup has a capable
model, the demonstration has this.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a script answers: text; a dict or list, sent as JSON text; a number, sent as that HTTP status.
Script = Callable[[dict[str, Any]], Any]


class ScriptedModel:
    """`with ScriptedModel(script) as server:` serves /v1/models, /v1/chat/completions and /metrics.

    script: gets the body of a chat request, returns the answer (see Script); it may be called by several
    threads. requests: all bodies so far. num_running, num_waiting, num_ended: what /metrics says.
    """

    def __init__(self, script: Script, *, model: str = "scripted"):
        self.script = script
        self.model = model
        self.requests: list[dict[str, Any]] = []
        self.num_running = self.num_waiting = self.num_ended = 0
        handler = type("Handler", (_Handler,), {"scripted": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> ScriptedModel:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    scripted: ScriptedModel
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers' acknowledgement

    def do_GET(self) -> None:
        own = self.scripted
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": own.model, "object": "model"}]})
        elif self.path == "/metrics":
            lines = [
                f'vllm:num_requests_running{{engine="0"}} {own.num_running}.0',
                f'vllm:num_requests_waiting{{engine="0"}} {own.num_waiting}.0',
                f'vllm:request_success_total{{engine="0",finished_reason="stop"}} {own.num_ended}.0',
            ]
            self._send(200, "\n".join(lines) + "\n")
        else:
            self._send(404, {"error": {"message": "no such route", "code": "not_found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": "no such route", "code": "not_found"}})
            return
        self.scripted.requests.append(body)
        answer = self.scripted.script(body)
        if isinstance(answer, int):
            self._send(answer, {"error": {"message": "as scripted", "code": "scripted"}})
            return
        text = answer if isinstance(answer, str) else json.dumps(answer)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.scripted.num_ended += 1
        self._send(
            200, {"id": "c", "object": "chat.completion", "model": self.scripted.model, "choices": [choice]}
        )

    def _send(self, status: int, data: Any) -> None:
        is_text = isinstance(data, str)
        payload = data.encode() if is_text else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if is_text else "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass
