"""A prompt that takes longer than two drops of the prefix cache are apart ends all the same (fault 14)."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, chat, start_live, wait_for

from apollo_ipc.demo.real_model import copy_real_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
NUM_TOKENS = 3_000  # many seconds of one core, as 16,000 take on a GPU


@pytest.fixture(scope="module")
def roomy(real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    model_dir = copy_real_model(tmp_path_factory.mktemp("roomy") / "model")
    with tempfile.TemporaryDirectory(prefix="apollo-t-", dir="/tmp") as base:
        live = start_live(model_dir, Path(base), "--max-model-len", "8192")
        yield live
        live.close()


def time_to_first_token(live: Live, seed: int) -> float:
    ids = random.Random(seed).choices(range(1000, 40_000), k=NUM_TOKENS)  # in no cache
    started = time.monotonic()
    response = live.post("/v1/completions", {"model": live.server.model_name, "prompt": ids, "max_tokens": 1})
    assert response.status_code == 200, response.text
    return time.monotonic() - started


def test_a_long_prompt_ends_under_a_stream_of_small_jobs(roomy: Live) -> None:
    alone_s = time_to_first_token(roomy, seed=1)
    jobs, stop = [], threading.Event()

    def train() -> None:
        while not stop.is_set():
            jobs.append(roomy.train([chat("Who?", f"Number {len(jobs)}.")], lr=1e-6))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        wait_for(lambda: len(jobs) > 1, "a stream of jobs", 300)
        before = len(jobs)
        beside_s = time_to_first_token(roomy, seed=2)
    finally:
        stop.set()
        thread.join()
    print(f"first token after {alone_s:.1f} s alone, {beside_s:.1f} s beside {len(jobs) - before} jobs")
    assert {job["status"] for job in jobs} == {"applied"}
    # Preempted once at most, and the CPU shared with training.
    assert beside_s < 8 * alone_s
