"""One training step taken apart, in a process alone on the device. For gpu_loop.py, which runs it at its end.

The worker's own trainer on the checkpoint in memory of its own: forward pass and loss, the same with backward
and every gradient thrown away, and the whole step. The optimizer works inside backward, so its share is the
difference; its floor is what it cannot do without (gradient read twice, weight read and written) over a
measured bandwidth, as in optimizer.py.

    python benchmarks/gpu_loop_step.py MODEL_DIR TOKENS ROUNDS      prints one JSON object
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.hf_model import vocab_size_of
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.step import Trainer
from apollo_worker.step.update import Row
from optimizer import Clock, bandwidth
from torch import Tensor

from apollo_ipc.config import load_config

PASSES = 4
WARM_UP_STEPS = 2
LEARNING_RATE = 1e-5


def split(model_dir: Path, num_tokens: int, rounds: int) -> dict[str, Any]:
    config = load_config()
    torch.set_num_threads(config.worker.num_threads or len(os.sched_getaffinity(0)))
    live = load_offline(model_dir)
    trainer = Trainer(live, config.train)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size_of(live.model), (num_tokens,), generator=generator).tolist()
    example = TokenisedExample(ids, [False] + [True] * (num_tokens - 1))
    for _ in range(WARM_UP_STEPS):
        trainer.step(example, LEARNING_RATE)
    peak_bytes = peak_of(lambda: trainer.step(example, LEARNING_RATE)) if live.device.type == "cuda" else None

    seconds: dict[str, list[float]] = {"forward": [], "forward_backward": [], "step": []}
    for _ in range(rounds):
        seconds["forward"].append(timed(lambda: forward(trainer, example)))
        with patch.object(trainer.optimizer, "update_parameter", drop_gradient):
            seconds["forward_backward"].append(timed(lambda: trainer._backward(example, 1.0)))
        seconds["step"].append(timed(lambda: trainer.step(example, LEARNING_RATE)))
    forward_s, both_s, step_s = (statistics.median(values) for values in seconds.values())
    weight_bytes = sum(p.nbytes for p in live.model.parameters())
    state_bytes = trainer.main_optimizer.state_size_bytes()
    bytes_per_s = bandwidth(Clock(live.device.type), live.device.type)
    floor_s = PASSES * weight_bytes / bytes_per_s
    return {
        "num_tokens": num_tokens, "rounds": rounds, "step_s": step_s, "forward_s": forward_s,
        "backward_s": both_s - forward_s, "optimizer_s": step_s - both_s,
        "optimizer_floor_s": floor_s, "optimizer_over_floor": (step_s - both_s) / floor_s,
        "bandwidth_bytes_per_s": bytes_per_s, "weight_bytes": weight_bytes,
        "optimizer_state_bytes": state_bytes, "step_peak_allocated_bytes": peak_bytes,
        "step_quartiles_s": statistics.quantiles(seconds["step"], n=4) if rounds > 1 else None,
    }  # fmt: skip


def forward(trainer: Trainer, example: TokenisedExample) -> float:
    """The loss, with the graph that backward would need; the step waits for it too."""
    with torch.enable_grad():
        row = Row(example, torch.full((example.num_targets,), 1 / example.num_targets))
        return float(trainer.forward.loss(trainer.forward.batch_of([row])).detach())


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that torch's tensors take on the GPU at most while it runs, beyond those before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    print(json.dumps(split(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
