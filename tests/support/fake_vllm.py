"""Stands in for vLLM's HTTP server: the routes that ServedModel asks, over a model whose token is a byte."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 4.0
vllm:request_success_total{engine="0",finished_reason="stop"} 10.0
vllm:request_success_total{engine="0",finished_reason="length"} 5.0
vllm:e2e_request_latency_seconds_count{engine="0"} 15.0
"""


class FakeVllm:
    """`with FakeVllm() as vllm:`. Its chat template is `user:TEXT|` and a newline for each turn.

    logprob: of a token, whatever stands before it. content, finish_reason: what every chat is answered, and
    why it ends. thinks: the generation prompt opens a thought, a turn without one has none. faults: statuses
    to answer first, one a request; refuses: a text that no request may hold (400). bodies: (path, body) of
    all requests with one.
    No training worker stands behind it.
    """

    def __init__(self) -> None:
        self.logprob: Callable[[int], float] = lambda token: -token / 100
        self.content = "Hello."
        self.finish_reason = "stop"
        self.thinks = False
        self.faults: list[int] = []
        self.refuses: str | None = None
        self.metrics = METRICS
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        handler = type("Handler", (_Handler,), {"own": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FakeVllm:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def render(self, body: dict[str, Any]) -> str:
        text = "".join(f"{one['role']}:{one['content']}|\n" for one in body["messages"])
        if not body["add_generation_prompt"]:
            return text
        is_open = self.thinks and body.get("chat_template_kwargs") != {"enable_thinking": False}
        return text + "assistant:" + "<think>" * is_open


class _Handler(BaseHTTPRequestHandler):
    own: FakeVllm
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers' acknowledgement

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(200, self.own.metrics)
        elif self.path == "/v1/models":
            self._send(200, {"data": [{"id": "m"}]})
        else:
            self._fail(503, "the training worker does not answer")

    def do_POST(self) -> None:
        own, text = self.own, self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = json.loads(text)
        own.bodies.append((self.path, body))
        if own.faults:
            self._fail(own.faults.pop(0), "not now")
        elif own.refuses is not None and own.refuses in text:
            self._fail(400, "as told")
        elif self.path == "/tokenize":
            self._send(200, {"tokens": list(own.render(body).encode())})
        elif self.path == "/detokenize":
            self._send(200, {"prompt": bytes(body["tokens"]).decode()})
        elif self.path == "/v1/completions":
            said = [None, *({str(token): {"logprob": own.logprob(token)}} for token in body["prompt"][1:])]
            self._send(200, {"choices": [{"text": "", "prompt_logprobs": said}]})
        else:
            choice = {"message": {"content": own.content}, "finish_reason": own.finish_reason}
            self._send(200, {"choices": [choice]})

    def _fail(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "param": "messages", "code": status}})

    def _send(self, status: int, data: Any) -> None:
        payload = (data if isinstance(data, str) else json.dumps(data)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass
