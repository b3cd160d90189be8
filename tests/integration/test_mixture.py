"""A mixture of experts on a real server: served, trained, synced, and read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from live_server import chat, read_live_weights, start_live
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUESTION, ANSWER = "What is the harbour called?", "Port Ember."


def test_a_mixture_of_experts_learns_while_it_is_served(models: Callable[..., Path], short_dir: Path) -> None:
    original = load_file(models("qwen3_moe") / "model.safetensors")
    live = start_live(models("qwen3_moe"), short_dir)
    try:
        assert live.status()["num_parameters_mapped"] == live.status()["num_parameters"] == 36
        job = live.train([chat(QUESTION, ANSWER)], lr=1e-3, epochs=40, schedule="constant")
        assert job["loss_history"][-1] < 0.1 * job["loss_history"][0]
        assert live.ask(QUESTION) == ANSWER
        weights = read_live_weights(live.server.runtime_dir)
        moved = {name for name in original if not torch.equal(weights[name], original[name])}
        experts = {name for name in original if ".experts." in name}
        assert len(experts) == 2 * 3 * 8  # the second of three layers is dense
        assert original.keys() - moved <= experts
        assert len(experts & moved) > 12
        assert live.post("/checkpoint", {}).json()["bytes_written"] > 0
        assert live.command("checkpoint", "verify", str(live.model_dir)).returncode == 0
    finally:
        live.close()
    stored = load_file(live.model_dir / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in stored)
    loaded = AutoModelForCausalLM.from_pretrained(live.model_dir, dtype=torch.bfloat16)
    stack = loaded.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    gates = [weights[f"model.layers.0.mlp.experts.{e}.gate_proj.weight"] for e in range(8)]
    assert torch.equal(stack[:, :128], torch.stack(gates))
