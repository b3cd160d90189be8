"""The two streams of soak.py: a client that trains and retries, a client that wants completions."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import httpx
from soak_faults import POISON
from soak_system import System

RETRY_S = 0.5
MAX_WAITING = 6  # of this client's jobs: the queue shall neither run dry nor grow
LEARNING_RATE = 1e-5
TOKENS = 8
PAUSE_S = 0.25  # training gets only what serving leaves


class Stream:
    """A thread that calls `turn` until the block is left."""

    def __init__(self, system: System, name: str):
        self.system = system
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(90)

    def _run(self) -> None:
        with httpx.Client(base_url=self.system.server.url, timeout=60) as client:
            while not self._stop.is_set():
                self._stop.wait(self.turn(client))

    def turn(self, client: httpx.Client) -> float:
        """Returns the seconds to wait before the next one."""
        raise NotImplementedError


class JobStream(Stream):
    """acknowledged: idempotency key -> (job id, steps); only what a 202 has said. kinds: key -> what it is,
    where that is no ordinary job: "poison" kills its trainer, "cancelled" was told to end. hold: no new job
    while it is set; is_mixed: with those kinds, and long jobs."""

    def __init__(self, system: System, seed: int, is_mixed: bool = False):
        super().__init__(system, "jobs")
        self._random = random.Random(seed)
        self._pending: tuple[str, dict[str, Any]] | None = None
        self.kinds: dict[str, str] = {}
        self.hold = threading.Event()
        self.is_mixed = is_mixed
        self._to_cancel: list[tuple[float, str]] = []  # (time.monotonic(), key)
        self.acknowledged: dict[str, tuple[str, int]] = {}
        self.num_retries = 0
        self.problems: list[str] = []

    def turn(self, client: httpx.Client) -> float:
        self._cancel(client)
        if self._pending is None:
            if self.hold.is_set():
                return RETRY_S
            if self._num_waiting(client) >= MAX_WAITING:
                return RETRY_S
            key = f"soak-{len(self.acknowledged)}"
            self._pending = key, self._new_body(key)
        key, body = self._pending
        try:
            headers = {**self.system.headers, "Idempotency-Key": key}
            response = client.post("/train", json=body, headers=headers)
        except httpx.TransportError:
            self.num_retries += 1
            return RETRY_S
        if response.status_code == 503:
            self.num_retries += 1
            return RETRY_S
        if response.status_code != 202:
            self.problems.append(f"POST /train {key}: {response.status_code} {response.text[:300]}")
            self._pending = None
            return RETRY_S
        steps = len(body["examples"]) * body["options"]["epochs"]
        self.acknowledged[key] = response.json()["job_id"], steps
        if self.is_mixed and self._random.random() < 0.1 and key not in self.kinds:
            self._to_cancel.append((time.monotonic() + self._random.uniform(0, 20), key))
        if self._random.random() < 0.2:
            self._send_again(client, key, body)
        self._pending = None
        return self._random.uniform(0.1, 1.0)

    def _send_again(self, client: httpx.Client, key: str, body: dict[str, Any]) -> None:
        """As a client does that has lost the answer: the same job must come back."""
        try:
            again = client.post("/train", json=body, headers={**self.system.headers, "Idempotency-Key": key})
        except httpx.TransportError:
            return
        if again.status_code == 202 and again.json()["job_id"] != self.acknowledged[key][0]:
            self.problems.append(f"{key}: two jobs, {self.acknowledged[key][0]}, {again.json()['job_id']}")

    def _num_waiting(self, client: httpx.Client) -> int:
        try:
            answer = client.get("/train/status", headers=self.system.headers)
            return answer.json()["num_queued"] if answer.status_code == 200 else 0
        except httpx.TransportError:
            return 0

    def _cancel(self, client: httpx.Client) -> None:
        """What has ended by then stays what it is."""
        for due in [one for one in self._to_cancel if one[0] <= time.monotonic()]:
            path = f"/train/jobs/{self.acknowledged[due[1]][0]}"
            try:
                answer = client.delete(path, headers=self.system.headers)
            except httpx.TransportError:
                return
            if answer.status_code == 503:
                return
            self._to_cancel.remove(due)
            self.kinds[due[1]] = "cancelled"

    def _new_body(self, key: str) -> dict[str, Any]:
        draw = self._random
        is_big, poison = draw.random() < 0.1, self.system.poison
        if self.is_mixed and poison is not None and draw.random() < 0.04:
            self.kinds[key] = "poison"
            example = {"context_ids": [poison, 1], "continuation_ids": [2, 3]}
            return {"examples": [example], "options": {"lr": LEARNING_RATE, "epochs": 1}}
        if self.is_mixed and draw.random() < 0.5:
            ids = [draw.randrange(POISON) for _ in range(24)]
            return {"examples": [{"context_ids": ids[:12], "continuation_ids": ids[12:]}],
                    "options": {"lr": LEARNING_RATE, "epochs": 1}}  # fmt: skip
        examples = []
        for _ in range(draw.randint(1, 6)):
            ids = [draw.randrange(POISON) for _ in range(draw.randint(8, 120))]
            cut = draw.randint(1, len(ids) - 1)
            examples.append({"context_ids": ids[:cut], "continuation_ids": ids[cut:]})
        options = {"lr": LEARNING_RATE, "epochs": draw.randint(5, 10) if is_big else 1}
        return {"examples": examples, "options": options}


class CompletionStream(Stream):
    """failures: outside vLLM's own downtime only."""

    def __init__(self, system: System):
        super().__init__(system, "completions")
        self.num_served = self.num_failed_while_down = self._number = 0
        self.failures: list[str] = []

    def turn(self, client: httpx.Client) -> float:
        self._number += 1
        body = {
            "model": self.system.server.model_name,
            "prompt": f"Request {self._number}:",
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": 0,
        }
        began = time.monotonic()
        try:
            response = client.post("/v1/completions", json=body)
            response.raise_for_status()
            assert response.json()["usage"]["completion_tokens"] == TOKENS, response.text[:300]
        except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
            if self.system.was_down(began, time.monotonic()):
                self.num_failed_while_down += 1
                return 0.2
            self.failures.append(f"{type(error).__name__}: {error}")
            return 0.2
        self.num_served += 1
        return PAUSE_S
