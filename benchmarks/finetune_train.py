"""Part of finetune.py: what a contestant is made of, and one run of it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from apollo_torch import APOLLOAdamW
from apollo_worker.optimizer.apollo import Apollo
from small_lm import (
    StoredModel,
    cosine,
    held_out_loss,
    lm_loss,
    random_windows,
    set_lr,
    unknown_keywords,
)
from torch import Tensor

if TYPE_CHECKING:
    from finetune_contestants import Contestant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Task:
    weights: dict[str, Tensor]  # where every run starts
    model: torch.nn.Module  # computes; its own weights are overwritten
    text: Tensor  # what is learned
    new_windows: Tensor  # held out of it
    old_windows: Tensor  # held out of what was known before
    num_steps: int
    num_evals: int


@dataclass(frozen=True)
class Outcome:
    curve_steps: list[int]
    curve: list[float]  # loss on `new_windows` after so many steps, 0 and the last among them
    forgetting: float  # rise of the loss on `old_windows`
    state_bytes: int
    s_per_step: float  # median; forward, backward and optimizer
    cpu_s_per_step: float  # the same in the process's own CPU time, which other processes do not lengthen
    optimizer_cpu_s: float  # of that the optimizer's

    @property
    def held_out_loss(self) -> float:
        return self.curve[-1]


def why_skipped(contestant: Contestant) -> str | None:
    if contestant.optimizer != "apollo":
        return None
    missing = unknown_keywords(Apollo, apollo_keywords(contestant))
    return f"Apollo has no keyword {', '.join(missing)}" if missing else None


def apollo_keywords(contestant: Contestant) -> dict:
    rounding = contestant.rounding or "nearest"  # fp32 is never rounded
    keywords = {"rank": contestant.rank, "rounding": rounding, "projection": contestant.projection}
    limiter = {"limiter_ratio": contestant.limiter_ratio}
    return keywords | ({} if contestant.limiter_ratio is None else limiter)


def make_optimizer(
    contestant: Contestant, named: list[tuple[str, torch.nn.Parameter]], lr: float, seed: int
) -> torch.optim.Optimizer:
    params = [param for _, param in named]
    if contestant.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    if contestant.optimizer == "sgd":
        return torch.optim.SGD(params, lr=lr)
    if contestant.optimizer == "apollo":
        return Apollo(named, lr=lr, seed=seed, **apollo_keywords(contestant))
    assert contestant.optimizer == "apollo-torch", contestant.optimizer
    assert contestant.rank is not None
    # Each tensor a group: `scale` is under a root there, so k / rank is our alpha = sqrt(k / rank).
    groups: list[dict] = []
    for param in params:
        is_projected = param.dim() == 2 and min(param.shape) >= contestant.rank
        own = {
            "rank": contestant.rank, "update_proj_gap": 200, "scale": min(param.shape) / contestant.rank,
            "proj": "random", "proj_type": "std", "scale_type": "channel",
        }  # fmt: skip
        groups.append({"params": [param], **(own if is_projected else {})})
    optimizer = APOLLOAdamW(groups, lr=lr, eps=1e-8)  # pyright: ignore[reportArgumentType]  # as torch: groups too
    for state in optimizer.state.values():
        state["seed"] += 1000 * seed
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """apollo-torch keeps its projections; ours makes them anew."""
    total = 0
    for state in optimizer.state.values():
        matrix = getattr(state.get("projector"), "ortho_matrix", None)
        tensors = [value for value in (*state.values(), matrix) if isinstance(value, Tensor)]
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def eval_steps(num_steps: int, num_evals: int) -> list[int]:
    """After so many steps the held-out loss is taken; 0 and `num_steps` among them."""
    return sorted({round(i * num_steps / num_evals) for i in range(num_evals + 1)})


def train(contestant: Contestant, lr: float, seed: int, task: Task) -> Outcome:
    """One run. The data and their order depend on `seed` alone."""
    generator = torch.Generator().manual_seed(1 + seed)
    stored = StoredModel(task.model, task.weights, DTYPES[contestant.storage])
    optimizer = make_optimizer(contestant, stored.named, lr, seed)
    known = held_out_loss(task.model, task.old_windows)
    curve = [held_out_loss(task.model, task.new_windows)]
    at = eval_steps(task.num_steps, task.num_evals)
    wall_s, cpu_s, optimizer_s = [], [], []
    for step in range(task.num_steps):
        windows = random_windows(task.text, 1, generator)  # one example a step, as the live loop
        started, cpu_started = time.perf_counter(), time.process_time()
        set_lr(optimizer, cosine(step, task.num_steps, lr))
        stored.backward(lm_loss(task.model, windows))
        before_update = time.process_time()
        optimizer.step()
        cpu_s.append(time.process_time() - cpu_started)
        optimizer_s.append(time.process_time() - before_update)
        wall_s.append(time.perf_counter() - started)
        stored.load()
        if step + 1 in at:
            curve.append(held_out_loss(task.model, task.new_windows))
    return Outcome(
        curve_steps=at,
        curve=curve,
        forgetting=held_out_loss(task.model, task.old_windows) - known,
        state_bytes=state_bytes(optimizer),
        s_per_step=statistics.median(wall_s),
        cpu_s_per_step=statistics.median(cpu_s),
        optimizer_cpu_s=statistics.median(optimizer_s),
    )
