"""Do vLLM's log-probabilities come from the weights that we see? Judged by what the numbers can bear.

A forward pass in bf16 is off by what its roundings add up to: some hundredths of a nat for a model that means
something, thousandths for a random one. So both are held against the same weights computed in fp32: the
worker's own forward pass in the served dtype says how far roundings alone lead (the floor), and vLLM's is
judged by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from torch import Tensor


class Distance(msgspec.Struct, frozen=True):
    """Of log-probabilities from those of the fp32 forward pass, over tokens, in nats."""

    mean: float
    p90: float
    p99: float
    max: float


class Agreement(msgspec.Struct, frozen=True):
    """served: vLLM's distance; floor: the worker's own in the served dtype. difference: the largest between
    the two."""

    num_tokens: int
    served: Distance
    floor: Distance
    difference: float


# vLLM's figure, in the floor's: its roundings are other ones at other places. Clean ones and planted faults:
# docs/architectures.md. In a trained model the worst token of some hundred is chance (six times between two
# clean passes), so it counts only where the weights are those of `scramble`, in which roundings do not grow.
MOST = {"mean": 1.6, "p90": 1.8, "p99": 2.5}
MOST_SCRAMBLED = MOST | {"max": 4.0}
# A router has near-ties in the weights as they are, and a rounding that turns one over moves its token, and
# in a recurrence those after it, to another expert: two clean passes were up to 1.8 and 2.2 apart. The router
# of `scramble` has few.
MOST_ROUTED = {"mean": 2.5, "p90": 3.0, "p99": 4.0}
# In fp32 the floor is the reference itself. Two orders of summation lead this far apart (measured: 1e-5).
SLACK = {"float32": 1e-3}


def judge(found: Agreement, dtype: str, most: Mapping[str, float]) -> list[str]:
    """A reason for each figure that roundings do not explain; empty: the two forward passes agree."""
    if not math.isfinite(found.floor.max):
        return ["the worker's own log-probabilities are not finite"]
    reasons = []
    for name, factor in most.items():
        served, floor = getattr(found.served, name), getattr(found.floor, name)
        if not served <= factor * floor + SLACK.get(dtype, 0.0):
            reasons.append(
                f"{name} {served:.3g} nats from the fp32 forward pass, where roundings explain {floor:.3g} "
                f"(limit: {factor:g} times that)"
            )
    return reasons


def agreement(served: Tensor, own: Tensor, reference: Tensor) -> Agreement:
    """Of the log-probabilities of the same tokens, of any shape. What is not a number is infinitely far."""
    return Agreement(
        reference.numel(),
        served=_distance(served - reference),
        floor=_distance(own - reference),
        difference=float(_absolute(served - own).max()),
    )


def _distance(error: Tensor) -> Distance:
    error = _absolute(error).sort().values
    at = [min(len(error) - 1, int(share * len(error))) for share in (0.9, 0.99)]
    return Distance(float(error.mean()), float(error[at[0]]), float(error[at[1]]), float(error[-1]))


def _absolute(error: Tensor) -> Tensor:
    return error.flatten().abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
