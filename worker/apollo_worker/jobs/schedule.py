"""The learning rate of each step of a job."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["auto", "constant", "cosine"]
Resolved = Literal["constant", "cosine"]


def resolve_schedule(schedule: Schedule, num_examples: int) -> Resolved:
    """What "auto" means for a job: constant for a single example, cosine with warm-up for a bulk job."""
    if schedule == "auto":
        return "constant" if num_examples == 1 else "cosine"
    return schedule


def learning_rate(
    step: int, num_steps: int, *, peak: float, schedule: Resolved, warmup_fraction: float
) -> float:
    """Learning rate of `step` (0-based) in a job of `num_steps`.

    "cosine": ceil(warmup_fraction * num_steps) steps rise linearly from peak / that number to peak; from
    there half a cosine falls towards 0, which it would reach at step `num_steps`, one past the last. So no
    step has a rate of 0: each one costs a forward and a backward pass, and shall do something.
    """
    assert 0 <= step < num_steps, f"step {step} of {num_steps}"
    if schedule == "constant":
        return peak
    assert schedule == "cosine", schedule
    # Without the allowance 0.1 * 30 = 3.0000000000000004 would be four steps.
    num_warmup = math.ceil(warmup_fraction * num_steps - 1e-9)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
