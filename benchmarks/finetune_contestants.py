"""Who runs in finetune.py, by name; loads nothing that computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    name: str
    optimizer: str
    storage: str
    rounding: str | None = None  # None: the optimizer's own, or nothing to round
    rank: int | None = None
    projection: str | None = None
    limiter_ratio: float | None = None  # None: the optimizer's own


def ours(
    name: str, storage: str, rounding: str | None, *, rank=64, projection="gaussian", limiter_ratio=None
):
    return Contestant(name, "apollo", storage, rounding, rank, projection, limiter_ratio)


REFERENCE, STOCHASTIC, NEAREST = "apollo-fp32", "apollo-stochastic", "apollo-nearest"
CONTESTANTS = [
    Contestant("adamw-fp32", "adamw", "fp32"),
    Contestant("sgd-fp32", "sgd", "fp32"),
    Contestant("apollo-torch-bf16", "apollo-torch", "bf16", rank=64, projection="gaussian"),
    ours(REFERENCE, "fp32", None),
    ours(NEAREST, "bf16", "nearest"),
    ours(STOCHASTIC, "bf16", "stochastic"),
    ours("apollo-kahan", "bf16", "kahan"),
    ours("apollo-rank-16", "bf16", "stochastic", rank=16),
    ours("apollo-rank-1", "bf16", "stochastic", rank=1),
    ours("apollo-block-sign", "bf16", "stochastic", projection="block_sign"),
    ours("apollo-limiter-off", "bf16", "stochastic", limiter_ratio=0.0),
]
