"""`apollo-ipc plan` against what a real step on the GPU allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from apollo_worker.commands.memory_plan import Request, plan
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.step import Trainer

from apollo_ipc.config import Train
from apollo_ipc.demo.models import make_model

SHAPES: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_dense_models_step_is_forecast_within_a_tenth(tmp_path: Path, checkpointing: bool):
    options = Train(max_tokens=2048, activation_checkpointing=checkpointing)
    made = plan(Request(str(make_model(tmp_path / "m", "qwen3", **SHAPES)), options, 0.5))
    trainer = Trainer(load_offline(tmp_path / "m", torch.device("cuda")), options)
    example = TokenisedExample([i % 32768 for i in range(2048)], [True] * 2048)
    trainer.step(example, 1e-5)  # compiles, and makes cuBLAS's workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.step(example, 1e-5)
    torch.cuda.synchronize()
    forecast = next(item.bytes for item in made.trainer if item.name.startswith("one step"))
    assert forecast == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
