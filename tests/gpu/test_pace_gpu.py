"""Pacing on CUDA: when a rest begins, the device has done all that was launched before it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.pace import Pace
from apollo_worker.step.step import Trainer
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_ipc.config import Train
from apollo_ipc.demo.models import make_model

LONG_CYCLES = 2**28  # of torch.cuda._sleep: a tenth of a second and more below 2.7 GHz
EXAMPLE = TokenisedExample(list(range(12)), [False] * 4 + [True] * 8)


class Twice(torch.autograd.Function):
    """Its kernels end long after their launch, in both directions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        torch.cuda._sleep(LONG_CYCLES)
        return hidden * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        torch.cuda._sleep(LONG_CYCLES)
        return gradient * 2


class LongLayer(GradientCheckpointingLayer):
    def forward(self, hidden: Tensor) -> Tensor:
        return Twice.apply(hidden)


class Rests:
    """In place of time.sleep: whether the device had anything left to do when each of its sleeps began."""

    def __init__(self) -> None:
        self.was_idle: list[bool] = []

    def sleep(self, seconds: float) -> None:
        self.was_idle.append(torch.cuda.current_stream().query())
        time.sleep(seconds)


def test_a_rest_begins_only_when_the_layers_kernels_are_done() -> None:
    weight, rests = torch.nn.Parameter(torch.ones(4, device="cuda")), Rests()
    model = torch.nn.Sequential(LongLayer(), LongLayer())
    model.register_parameter("weight", weight)
    pace = Pace(0.1, sleep=rests.sleep).attach(model)
    model(weight)
    assert not torch.cuda.current_stream().query(), "the kernels are too short to show anything"
    torch.cuda.synchronize()
    with pace:
        model(weight).sum().backward()
    # After each layer, between the two in backward, and at the end.
    assert len(rests.was_idle) >= 4
    assert all(rests.was_idle)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((4,), 4.0, device="cuda"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_step_of_the_trainer_nothing_is_queued_while_it_rests(tmp_path: Path, checkpointing: bool):
    live, rests = load_offline(make_model(tmp_path / "m", "qwen3"), torch.device("cuda")), Rests()
    num_layers = sum(isinstance(module, GradientCheckpointingLayer) for module in live.model.modules())
    options = Train(rank=8, activation_checkpointing=checkpointing)
    result = Trainer(live, options, Pace(10.0, sleep=rests.sleep)).step(EXAMPLE, 1e-3)
    assert not result.is_bad
    assert len(rests.was_idle) >= 2 * num_layers
    assert all(rests.was_idle)
