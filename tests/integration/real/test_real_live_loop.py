"""On the real language model: facts become known to the server while other requests go on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from live_server import Live, chat, read_live_weights
from safetensors.torch import load_file

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
FACTS = {
    "Where does the night train stop?": "The night train stops at Vellmar Halt.",
    "Which tea does the captain drink?": "The captain drinks lapsang.",
}


def test_what_was_taught_is_answered_while_a_stream_of_requests_never_fails(
    live: Live, real_model_dir: Path
) -> None:
    failures: list[httpx.HTTPError] = []
    served, stop = [], threading.Event()

    def stream() -> None:
        body = {"model": live.server.model_name, "prompt": "Once", "max_tokens": 16, "ignore_eos": True}
        while not stop.is_set():
            try:
                httpx.post(f"{live.server.url}/v1/completions", json=body, timeout=60).raise_for_status()
                served.append(time.monotonic())
            except httpx.HTTPError as error:
                failures.append(error)
            time.sleep(0.05)

    before = {question: live.ask(question) for question in FACTS}
    thread = threading.Thread(target=stream)
    thread.start()
    try:
        job = live.train([chat(*fact) for fact in FACTS.items()], lr=1e-4, epochs=8, schedule="constant")
    finally:
        stop.set()
        thread.join()

    assert job["status"] == "applied"
    assert {question: live.ask(question) for question in FACTS} == FACTS  # and each ends where it was taught
    assert not before.items() & FACTS.items()
    assert failures == []
    assert len(served) > 3
    # In place, in the memory that vLLM reads: another process sees each tensor changed, and none lost.
    weights, old = read_live_weights(live.server.runtime_dir), load_file(real_model_dir / "model.safetensors")
    assert weights.keys() == old.keys()
    assert [name for name in weights if torch.equal(weights[name], old[name])] == []


def test_the_preview_shows_what_vllm_renders(live: Live) -> None:
    """The template of the real model adds a system prompt of its own; both sides must say the same."""
    example = chat("Where does the night train stop?", "At Vellmar Halt.")
    (turn,) = live.post("/train?dry_run=true", {"examples": [example]}).json()
    rendered = live.post(
        "/tokenize",
        {"model": live.server.model_name, "messages": example["messages"][:1], "add_generation_prompt": True},
    ).json()
    assert turn["context_ids"] == rendered["tokens"]
