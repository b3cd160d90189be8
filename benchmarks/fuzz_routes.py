"""Random requests at every route, in process (ASGI). For fuzz.py."""

from __future__ import annotations

import asyncio
import json
import random
import time
import traceback
from typing import Any

from fuzz_grammar import NAMES, Grammar, changed_bytes, encode
from fuzz_system import BOUND_S, TRAIN_KEY, WAIT_S, Findings

from apollo_ipc.wire.replies import ENDED_STATES

MAX_CHUNKS = 4
EVENTS_S = 0.5  # how long a stream of a job that goes on is read
KEYED = {b"authorization": f"Bearer {TRAIN_KEY}".encode()}
JSON = {b"content-type": b"application/json"}
OTHER_HEADERS = (
    {b"content-type": b"text/plain"},
    {b"content-type": b"multipart/form-data"},
    {b"content-type": b"\xff"},
    {b"content-type": b"multipart/form-data; boundary=" + b"x" * 300},
    {b"content-encoding": b"gzip"},
    {b"content-length": b"999999999999999999999"},
    {b"content-length": b"-1"},
    {b"content-length": b"\xb2"},
    {b"authorization": b"Bearer"},
    {b"authorization": b"Bearer \xff\xfe"},
    {b"authorization": b"Basic eDp5"},
    {b"cookie": b"apollo_session=1.2.3"},
    {b"cookie": b"\xff=;;"},
    {b"idempotency-key": b""},
    {b"idempotency-key": b"\xe9"},
    {b"idempotency-key": b"k" * 256},
    {b"x-stainless-retry-count": b"x"},
    {b"origin": b"null"},
    {b"host": b"\xff"},
    {b"accept": b"*"},
    {b"if-none-match": b"\xff"},
)
JOBS = "/train/jobs/{job}"
# (method, path, what the body may be)
ROUTES = (
    ("GET", "/train/status", None),
    ("GET", "/train/jobs", None),
    ("GET", JOBS, None),
    ("DELETE", JOBS, None),
    ("POST", JOBS + "/pause", None),
    ("POST", JOBS + "/resume", None),
    ("GET", JOBS + "/events", None),
    ("POST", "/checkpoint", {"kind": "delta"}),
    ("POST", "/checkpoint/restore", {"version": 1}),
    ("POST", "/checkpoint/pin", {"version": 1}),
    ("GET", "/checkpoint/history", None),
    ("POST", "/feedback", {"completion_id": "cmpl-1", "rating": "up"}),
    ("GET", "/train/health", None),
    ("POST", "/teach", {"facts": ["The spare badge is in the cocoa tin."]}),
    ("GET", "/teach/jobs", None),
    ("GET", "/teach/jobs/{job}", None),
    ("DELETE", "/teach/jobs/{job}", None),
    ("GET", "/teach/lessons", None),
    ("POST", "/teach", {"text": "The harbour is called Vell. It was built in 1911.", "options": {}}),
    ("POST", "/train/v1/files", "form"),
    ("GET", "/train/v1/files", None),
    ("GET", "/train/v1/files/{job}", None),
    ("GET", "/train/v1/files/{job}/content", None),
    ("DELETE", "/train/v1/files/{job}", None),
    (
        "POST",
        "/train/v1/fine_tuning/jobs",
        {"model": "m", "training_file": "file-1", "seed": 1, "suffix": "a"},
    ),
    ("GET", "/train/v1/fine_tuning/jobs", None),
    ("GET", "/train/v1/fine_tuning/jobs/{job}", None),
    ("POST", "/train/v1/fine_tuning/jobs/{job}/cancel", None),
    ("GET", "/train/v1/models", None),
    ("GET", "/train/v1/models/{job}", None),
    ("GET", "/train/v1/fine_tuning/jobs/{job}/events", None),
    ("POST", "/train/v1/chat/completions", {"model": "m", "messages": []}),
    ("GET", "/train/ui", None),
    ("GET", "/train/ui/static/{job}", None),
    ("POST", "/train/ui/login", {"key": "k"}),
    ("GET", "/train/ui/session", None),
    ("GET", "/train/ui/quality", None),
    ("POST", "/train/ui/logout", None),
)
QUERIES = (
    "wait=true",
    "before=" + "9" * 30,
    "before=9223372036854775807",
    "dry_run=true",
    "wait=1",
    "limit=10",
    "limit=0",
    "limit=1e3",
    "state=queued",
    "state=x",
    "before=1",
    "before=-1",
    "wait=true&wait=true",
    "a=b",
    "%ff=%00",
    "after=%ed%a0%80",
    "&&=",
    "metadata[a]=b",
    "limit=" + "9" * 400,
    "order=asc",
    "purpose=x",
)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "", "get", "\xe9")


class Routes:
    def __init__(self, app: Any, draw: random.Random, tally: Findings):
        self.app, self.draw, self.tally = app, draw, tally
        self.grammar = Grammar(draw)
        self.jobs: list[str] = []
        self.names: list[str] = ["job-000000000000-00000000", "1", "index.html"]  # ids that something has
        self.keys: dict[str, tuple[bytes, str]] = {}

    async def turn(self) -> None:
        await (self.train() if self.draw.random() < 0.6 else self.other())

    async def train(self) -> None:
        draw, headers, query = self.draw, KEYED | JSON, ""
        right = self.grammar.train_body()
        if draw.random() < 0.3:
            kind, body, expected = "right body", encode(right), "taken"
        else:
            body, expected = self.grammar.broken(right)
            kind = "broken body"
        if draw.random() < 0.1:
            query = draw.choice(("wait=true", "dry_run=true"))
        key = f"fuzz-{draw.randrange(10**12)}"
        headers = headers | {b"idempotency-key": key.encode()}
        status, told = await self.ask(f"train: {kind}", "POST", "/train", query, headers, body)
        if told is None:
            return
        is_taken = status in (200, 202) or told.get("job") is not None
        code = (told.get("error") or {}).get("code")
        if (expected == "refused" and is_taken) or (expected == "taken" and status == 400):
            self.tally.problem(f"{kind} must be {expected}, was {status} {told}: {body[:2000]!r}")
        if is_taken and (job_id := (told.get("job") or told).get("job_id")):
            self.jobs.append(job_id)
            if draw.random() < 0.1:
                await self.same_again(key, headers, body, job_id)
        elif code == "queue_full":
            await self.empty_queue()

    async def same_again(self, key: str, headers: dict[bytes, bytes], body: bytes, job_id: str) -> None:
        status, told = await self.ask("train: same again", "POST", "/train", "", headers, body)
        if status != 503 and (told or {}).get("job_id") != job_id:
            self.tally.problem(f"the same key and body: {status} {told}, first it was {job_id}")
        other = encode({"prompt": key, "completion": "another body"})
        status, _ = await self.ask("train: another body, same key", "POST", "/train", "", headers, other)
        if status not in (422, 503):
            self.tally.problem(f"the same key and another body: {status}")

    async def empty_queue(self) -> None:
        for job_id in self.jobs:
            await self.ask("cancel", "DELETE", f"/train/jobs/{job_id}", "", dict(KEYED), b"")
        self.jobs.clear()

    async def other(self) -> None:
        draw = self.draw
        method, path, wanted = draw.choice(ROUTES)
        kind = f"{method} {path}"
        known = draw.choice([*self.names, *self.jobs[-20:]])
        name = (
            known if draw.random() < 0.6 else str(draw.choice((*NAMES, "%00", "..", "a/b", "x" * 3000, "é")))
        )
        path = path.replace("{job}", name)
        if draw.random() < 0.1:
            method = draw.choice(METHODS)
        headers = dict(KEYED)
        body, extra = self.body_of(wanted)
        headers |= extra
        if draw.random() < 0.2:
            headers |= draw.choice(OTHER_HEADERS)
        query = draw.choice(QUERIES) if draw.random() < 0.2 else ""
        _, told = await self.ask(kind, method, path, query, headers, body)
        for field in ("id", "job_id"):
            if isinstance(told, dict) and isinstance(told.get(field), str):
                self.names = [*self.names[-20:], told[field]]

    def body_of(self, wanted: Any) -> tuple[bytes, dict[bytes, bytes]]:
        draw = self.draw
        if wanted is None:
            return (draw.randbytes(20) if draw.random() < 0.1 else b""), {}
        if wanted == "form":
            data = self.form()
            return data, {b"content-type": b"multipart/form-data; boundary=frontier"}
        if draw.random() < 0.3:
            return encode(wanted), dict(JSON)
        return self.grammar.broken(wanted)[0], dict(JSON)

    def form(self) -> bytes:
        draw = self.draw
        lines = [encode(self.grammar.chat()) for _ in range(draw.randint(1, 3))]
        name = str(draw.choice(("a.jsonl", "", "é.jsonl", "../x", "a\\b"))).encode()
        file = (
            b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\n" + b"\n".join(lines) + b"\r\n"
        )
        purpose = b'--frontier\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        data = purpose + file + b"--frontier--\r\n"
        return data if draw.random() < 0.4 else changed_bytes(draw, data)

    async def ask(
        self, kind: str, method: str, path: str, query: str, headers: dict[bytes, bytes], body: bytes
    ) -> tuple[int, dict[str, Any] | None]:
        """(status, JSON of the answer); a crash, a hang or an answer that tells too much is noted."""
        is_stream = path.endswith("/events") and "fine_tuning" not in path
        started, shown = time.monotonic(), f"{method} {path[:200]}?{query} {headers} {body[:3000]!r}"
        try:
            answer = call(self.app, method, path, query, headers, self.pieces(body), is_stream)
            status, data = await asyncio.wait_for(answer, BOUND_S + WAIT_S)
        except TimeoutError:
            self.tally.count(kind, "hang")
            self.tally.problem(f"no answer within {BOUND_S + WAIT_S:g} s: {shown}")
            return 0, None
        except Exception:
            self.tally.count(kind, "exception")
            self.tally.problem(f"{shown}: {traceback.format_exc()[-3000:]}")
            return 0, None
        self.tally.count(kind, str(status), time.monotonic() - started)
        tells_too_much = b"Traceback (most recent" in data or b'File "/' in data
        if (status >= 500 and status != 503) or tells_too_much:
            self.tally.problem(f"{status} {data[:500]!r}: {shown}")
        try:
            told = json.loads(data) if data else None
        except ValueError:
            return status, None  # a page, a file, a stream
        is_ours = (
            path.startswith(("/train", "/teach", "/checkpoint", "/feedback")) and "completions" not in path
        )
        if status >= 400 and is_ours and not _is_error(told) and status not in (404, 405):
            self.tally.problem(f"{status} without an error object, {data[:300]!r}: {shown}")
        return status, told if isinstance(told, dict) else None

    def pieces(self, body: bytes) -> list[bytes]:
        cuts = sorted(self.draw.randrange(len(body) + 1) for _ in range(self.draw.randrange(MAX_CHUNKS)))
        return [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]

    async def canary(self, within_s: float = 120.0) -> None:
        """Whatever came before, a plain job trains."""
        body, deadline = encode({"prompt": "canary", "completion": "sings"}), time.monotonic() + within_s
        while True:
            await self.empty_queue()
            status, told = await self.ask("canary", "POST", "/train", "", KEYED | JSON, body)
            if status == 202 and told:
                break
            if time.monotonic() > deadline:
                return self.tally.problem(f"no job is taken any more: {status} {told}")
            await asyncio.sleep(0.5)
        while time.monotonic() < deadline:
            status, job = await self.ask(
                "canary", "GET", f"/train/jobs/{told['job_id']}", "", dict(KEYED), b""
            )
            if job and job.get("state") in ENDED_STATES:
                if job["state"] not in ("applied", "durable"):
                    self.tally.problem(f"a plain job ended as {job['state']}: {job.get('error')}")
                return None
            if job and job.get("status") == "paused":
                await self.resume_all()
            await asyncio.sleep(0.1)
        return self.tally.problem(f"a plain job was not trained in time: {job}")

    async def resume_all(self) -> None:
        _, listed = await self.ask("resume", "GET", "/train/jobs", "limit=1000", dict(KEYED), b"")
        for job in (listed or {}).get("data", []):
            if job["state"] in ("queued", "running"):
                await self.ask("resume", "POST", f"/train/jobs/{job['job_id']}/resume", "", dict(KEYED), b"")


def _is_error(told: Any) -> bool:
    error = told.get("error") if isinstance(told, dict) else None
    return isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}


async def call(
    app: Any,
    method: str,
    path: str,
    query: str,
    headers: dict[bytes, bytes],
    pieces: list[bytes],
    is_stream: bool,
) -> tuple[int, bytes]:
    """As a server calls an ASGI application. A stream is read for EVENTS_S, then its client hangs up."""
    raw = path.encode("utf-8", "surrogatepass")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": raw.decode("utf-8", "replace"),
        "raw_path": raw,
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), *headers.items()],
        "client": ("127.0.0.1", 1),
        "state": {},
        "server": ("127.0.0.1", 80),
    }
    waiting, gone, got, status = list(pieces), asyncio.Event(), bytearray(), 0

    async def receive() -> dict[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        got.extend(message.get("body", b""))

    running = asyncio.ensure_future(app(scope, receive, send))
    if is_stream:
        await asyncio.wait({running}, timeout=EVENTS_S)
        gone.set()
    await running
    return status, bytes(got)
