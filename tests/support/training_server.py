"""A training server as a client of `/train` sees it, with the faults of a bad night, and a model that says
a word to whatever it is asked.

It does what docs/http.md says of idempotency keys, and skips no duplicates: what it trains twice, a client
has sent under two keys.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENDED = ("applied", "durable", "failed", "cancelled", "quarantined")


class TrainingServer:
    """`with TrainingServer() as server:`. A job goes on by one state each time it is looked at.

    trained: jobs in which each example's answer went into the weights; held: answers of its own beside them;
    requests: (method, path) of all that came, but for what the model was asked (asked: its prompts).
    faults: taken from the front, one a request: a status to answer instead, "drop" to hang up unanswered, or
    "drop after" to do it and hang up; None for none. refuse: examples whose answer holds this word are
    refused, and with refuse_held those that are held, of prompts with this word. job_end: how jobs end. says:
    tokens of the model's answers; ask_status: a status to answer instead.
    """

    def __init__(self) -> None:
        self.trained: Counter[str] = Counter()
        self.held = 0
        self.requests: list[tuple[str, str]] = []
        self.asked: list[str] = []
        self.says = [7, 2]
        self.ask_status: int | None = None
        self.bodies: list[dict[str, Any]] = []  # of accepted jobs
        self.faults: list[int | str | None] = []
        self.refuse: str | None = None
        self.refuse_held: str | None = None
        self.job_end = "applied"
        self.num_syncs = 0
        self.restored: list[int] = []
        self.pinned: int | None = None
        self.jobs: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.lock = threading.Lock()
        self.weight_version = 1
        self._num_jobs = 0
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def __enter__(self) -> TrainingServer:
        self.come_up()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.go_down()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def come_up(self) -> None:
        """On the same port as before, with its queue."""
        handler = type("Handler", (_Handler,), {"own": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def go_down(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def lose_queue(self) -> None:
        self.jobs.clear()
        self.keys.clear()

    def submit(self, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if (known := self.keys.get(key)) is not None:
            if self.jobs[known]["body"] != body:
                return 422, error("the idempotency key was used with another body", "conflict")
            return 202, self.jobs[known]["info"]
        for i, example in enumerate(body["examples"]):
            refuse = self.refuse_held if is_held(example) else self.refuse
            if refuse is not None and refuse in content_of(example):
                field = f"examples[{i}].{'context_ids' if is_held(example) else 'messages'}"
                return 400, error("2050 tokens; at most 2048 fit", "invalid_example", field)
        self._num_jobs += 1
        job_id = f"job-{self._num_jobs}"
        num = len(body["examples"])
        info = {
            "job_id": job_id, "seq": self._num_jobs, "state": "queued", "status": "queued", "created_at": 1.0,
            "num_examples": num, "num_steps": num, "steps_done": 0, "idempotency_key": key,
        }  # fmt: skip
        self.jobs[job_id] = {"body": body, "info": info}
        self.keys[key] = job_id
        self.bodies.append(body)
        return 202, info

    def look(self, job_id: str) -> tuple[int, dict[str, Any]]:
        if job_id not in self.jobs:
            return 404, error(f"no job {job_id}", "not_found")
        job = self.jobs[job_id]["info"]
        seen = dict(job)
        if job["state"] == "queued":
            job["state"] = "running"
        elif job["state"] == "running":
            self._end(job_id)
        return 200, seen

    def end_all(self) -> None:
        """Jobs that nobody looks at are trained too."""
        for job_id, job in self.jobs.items():
            if job["info"]["state"] not in ENDED:
                self._end(job_id)

    def cancel(self, job_id: str) -> tuple[int, dict[str, Any]]:
        if job_id not in self.jobs:
            return 404, error(f"no job {job_id}", "not_found")
        job = self.jobs[job_id]["info"]
        if job["state"] in ENDED:
            return 409, error(f"job {job_id} has ended", "job_ended")
        job["state"] = "cancelled"
        return 200, job

    def restore(self, version: int) -> tuple[int, dict[str, Any]]:
        if any(job["info"]["state"] == "running" for job in self.jobs.values()):
            return 409, error("a job is being trained", "job_running")
        if version > self.weight_version:
            return 400, error(f"version {version} is not kept", "invalid_request", "version")
        self.restored.append(version)
        self.weight_version += 1
        return 200, {
            "restored_version": version, "weight_version": self.weight_version, "num_tensors_changed": 1,
            "num_jobs_undone": 0, "num_jobs_back": 0, "has_optimizer": True, "duration_s": 0.1,
        }  # fmt: skip

    def pin(self, version: int) -> tuple[int, dict[str, Any]]:
        before, self.pinned = self.pinned, version
        return 200, {"model_dir": "/models/mine", "pinned": version, "pinned_before": before}

    def _end(self, job_id: str) -> None:
        job, examples = self.jobs[job_id]["info"], self.jobs[job_id]["body"]["examples"]
        job["state"] = self.job_end
        if self.job_end in ("applied", "durable"):
            self.weight_version += 1
            self.trained.update({content_of(example) for example in examples if not is_held(example)})
            self.held += sum(map(is_held, examples))
            job.update(
                steps_done=len(examples), loss_first=2.0, loss_last=1.0, weight_version=self.weight_version
            )
        else:
            job.update(steps_done=1, loss_first=2.0, loss_last=2.0, error="three bad steps in a row")

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Of the model: a token is a byte of the prompt."""
        if self.ask_status is not None:
            return self.ask_status, error("as the test says", "fault")
        if path == "/tokenize":
            text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            return 200, {"tokens": list(text.encode())}
        self.asked.append(bytes(body["prompt"]).decode())
        rows = [{f"token_id:{one}": -0.1, "token_id:9": -2.5} for one in self.says]
        found = {"tokens": [f"token_id:{one}" for one in self.says], "top_logprobs": rows}
        return 200, {"choices": [{"logprobs": found}]}


def is_held(example: dict[str, Any]) -> bool:
    return "top_logprobs" in example


def content_of(example: dict[str, Any]) -> str:
    """The answer; of one that is held the prompt."""
    return bytes(example["context_ids"]).decode() if is_held(example) else example["messages"][-1]["content"]


def error(message: str, code: str, field: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": field, "code": code}}


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # a client that was killed hangs up


class _Handler(BaseHTTPRequestHandler):
    own: TrainingServer
    disable_nagle_algorithm = (
        True  # headers and body are two writes; the client would wait 40 ms for the second
    )

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"data": [{"id": "served"}]})
            return
        self._answer(lambda: self.own.look(self.path.rpartition("/")[2]))

    def do_DELETE(self) -> None:
        self._answer(lambda: self.own.cancel(self.path.rpartition("/")[2]))

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path in ("/tokenize", "/v1/completions"):
            with self.own.lock:
                answer = self.own.answer(self.path, json.loads(text))
            self._send(*answer)
            return
        if self.path == "/checkpoint/restore":
            self._answer(lambda: self.own.restore(json.loads(text)["version"]))
            return
        if self.path == "/checkpoint/pin":
            self._answer(lambda: self.own.pin(json.loads(text)["version"]))
            return
        if self.path == "/checkpoint":
            self.own.num_syncs += 1
            facts = {
                "weight_version": self.own.weight_version, "committed_at": 1.0, "num_tensors": 1,
                "num_tensors_changed": 1, "num_shards_written": 1, "bytes_compared": 1, "bytes_written": 1,
                "duration_s": 0.1,
            }  # fmt: skip
            self._answer(lambda: (200, facts))
            return
        self._answer(lambda: self.own.submit(self.headers["Idempotency-Key"], json.loads(text)))

    def _answer(self, do: Any) -> None:
        own = self.own
        with own.lock:
            own.requests.append((self.command, self.path))
            fault = own.faults.pop(0) if own.faults else None
            if isinstance(fault, int):
                status, data = fault, error("as the test says", {401: "wrong_train_key"}.get(fault, "fault"))
            elif fault == "drop":
                return
            else:
                status, data = do()
                payload = json.dumps(data).encode()  # under the lock: the job may change
            if fault == "drop after":
                return
        self._send(status, data if isinstance(fault, int) else payload)

    def _send(self, status: int, data: dict[str, Any] | bytes) -> None:
        payload = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass
