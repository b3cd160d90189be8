"""Two ranks of a real vLLM: attached, trained, synced, killed, restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from live_server import chat, read_live_weights, start_live
from safetensors.torch import load_file

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUESTION, ANSWER = "What is the harbour called?", "Port Ember."
PROMPT = list(range(60, 92))


def test_two_ranks_learn_and_forget_again(models: Callable[..., Path], short_dir: Path) -> None:
    model_dir = models("qwen3")
    original = load_file(model_dir / "model.safetensors")
    live = start_live(model_dir, short_dir, "--tensor-parallel-size", "2", "--max-model-len", "512")
    try:
        status = live.status()
        assert status["num_parameters_mapped"] == status["num_parameters"] == 46
        before = live.logprobs(PROMPT)
        assert live.post("/checkpoint", {}).status_code == 200
        job = live.train([chat(QUESTION, ANSWER)], lr=1e-3, epochs=40, schedule="constant")
        assert job["loss_history"][-1] < 0.1 * job["loss_history"][0]
        assert live.ask(QUESTION) == ANSWER
        assert live.post("/checkpoint", {}).json()["bytes_written"] > 0
        weights = read_live_weights(live.server.runtime_dir)
        stored = load_file(model_dir / "model.safetensors")
        assert all(torch.equal(weights[name], stored[name]) for name in original)
        assert all(not torch.equal(stored[name], original[name]) for name in original)
        live.kill_worker()
        live.start_worker()
        live.wait_attached()
        assert live.ask(QUESTION) == ANSWER
        restored = live.command("checkpoint", "restore", "0", "--live", "--yes")
        assert restored.returncode == 0, restored.stderr
        assert live.logprobs(PROMPT) == before
        weights = read_live_weights(live.server.runtime_dir)
        assert all(torch.equal(weights[name], original[name]) for name in original)
    finally:
        live.close()
