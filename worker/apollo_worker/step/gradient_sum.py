"""Gradients of several examples, summed in fp32 until one update takes them."""

from __future__ import annotations

import torch
from torch import Tensor


class GradientSum:
    """A sum in bf16 stops growing at some 256 equal terms: a new one is less than half of its last bit.

    In fp32 that begins at 16 million. It takes 4 bytes a parameter, nothing where an update has one example.
    """

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}  # by parameter, fp32

    @torch.no_grad()
    def add(self, parameter: Tensor) -> None:
        """Takes over `parameter.grad`."""
        assert parameter.grad is not None
        if (total := self._sums.get(parameter)) is None:
            self._sums[parameter] = parameter.grad.float()
        else:
            total += parameter.grad
        parameter.grad = None

    @torch.no_grad()
    def give_back(self, parameter: Tensor) -> None:
        """`parameter.grad` becomes the sum with itself, rounded once to the parameter's dtype."""
        if (total := self._sums.pop(parameter, None)) is not None:
            if parameter.grad is not None:
                total += parameter.grad
            parameter.grad = total.to(parameter.dtype)

    def parameters(self) -> list[Tensor]:
        """Those whose sum was not given back."""
        return list(self._sums)

    def clear(self) -> None:
        self._sums.clear()
