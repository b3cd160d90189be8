"""A prompt that takes longer than two drops of the prefix cache are apart ends all the same (fault 14)."""

from __future__ import annotations

import random
import threading
import time

import pytest
from live_server import Live, chat, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
NUM_TOKENS = 3_000  # many seconds of one core, as 16,000 take on a GPU


def time_to_first_token(live: Live, seed: int) -> float:
    ids = random.Random(seed).choices(range(1000, 40_000), k=NUM_TOKENS)  # in no cache
    started = time.monotonic()
    response = live.post("/v1/completions", {"model": live.server.model_name, "prompt": ids, "max_tokens": 1})
    assert response.status_code == 200, response.text
    return time.monotonic() - started


def test_a_long_prompt_ends_under_a_stream_of_small_jobs(live: Live) -> None:
    before_all = live.post("/checkpoint", {}).json()["weight_version"]
    alone_s = time_to_first_token(live, seed=1)
    jobs, stop = [], threading.Event()

    def train() -> None:
        while not stop.is_set():
            jobs.append(live.train([chat("Who?", f"Number {len(jobs)}.")], lr=1e-6))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        wait_for(lambda: len(jobs) > 1, "a stream of jobs", 300)
        before = len(jobs)
        beside_s = time_to_first_token(live, seed=2)
    finally:
        stop.set()
        thread.join()
    print(f"first token after {alone_s:.1f} s alone, {beside_s:.1f} s beside {len(jobs) - before} jobs")
    assert {job["status"] for job in jobs} == {"applied"}
    # Preempted once at most, and the CPU shared with training.
    assert beside_s < 8 * alone_s
    assert live.post("/checkpoint/restore", {"version": before_all}).status_code == 200
