"""Another, calm model in the same memory: what must follow when every weight changes in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from apollo_worker.model.live_tensor import LiveTensor, opened, place

ELEMENTS = 2**24  # made at a time


@torch.no_grad()
def scramble(tensors: Mapping[str, LiveTensor]) -> None:
    """Matrices become random with a gain of 1, norms 1 up to sign and a quarter, biases random, in place.

    No part of a tensor keeps its values, each layer matters about as much as any other, and roundings do not
    grow from layer to layer: in a trained model a stale norm can do less than roundings add up to, and in one
    whose own values were shuffled roundings hide everything. The same for the same names and shapes.
    """
    done = set()
    for name, live in tensors.items():
        if place(live) in done:  # tied, under another name
            continue
        done.add(place(live))
        with opened(live) as tensor:
            _scramble(name, tensor)


def _scramble(name: str, tensor: Tensor) -> None:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    generator = torch.Generator(tensor.device).manual_seed(seed)
    if tensor.dim() == 1:
        tensor.copy_(_other_vector(name, tensor, generator))
        return
    rows_at_once = max(1, ELEMENTS * len(tensor) // tensor.numel())
    for rows in tensor.split(rows_at_once):
        noise = torch.randn(rows.shape, generator=generator, device=tensor.device)
        rows.copy_(noise * _gain(tensor) * tensor.shape[-1] ** -0.5)


def _gain(matrix: Tensor) -> float:
    """Few rows are decisions (a router's, a gate's): clear ones, which roundings do not turn over, and each
    expert counts where it is chosen."""
    return 4.0 if matrix.dim() == 2 and 16 * len(matrix) <= matrix.shape[-1] else 1.0


def _other_vector(name: str, values: Tensor, generator: torch.Generator) -> Tensor:
    """Norms near 1 keep attention neither flat nor of one token alone, biases of half of that count beside
    what they are added to. Of others (decay rates) the values far from the rest stay out, and half change
    their sign: a recurrence that forgets all at once does not show how fast it does."""
    noise = torch.randn(values.shape, generator=generator, device=values.device)
    sign = torch.rand(values.shape, generator=generator, device=values.device).sub(0.5).sign()
    if name.endswith("weight") and ("norm" in name or "ln_" in name):
        return sign * (1 + 0.25 * noise)
    values = values.float()
    if name.endswith(".bias") or not values.any():
        return 0.5 * noise
    values = values[torch.randperm(len(values), generator=generator, device=values.device)]
    middle, spread = values.median(), values.std(correction=0)
    return sign * values.clamp(middle - 2 * spread, middle + 2 * spread) * (1 + 0.25 * noise)
