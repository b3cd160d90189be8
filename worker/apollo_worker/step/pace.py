"""Rests between decoder layers: for each second of a step's computing, `worker.pace` seconds for serving.

Two processes have a GPU by turns, and a trainer that always has work queued takes every turn it can get. At
a border between two layers the host waits until the device has done what was launched, so that nothing is
queued while it rests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

log = logging.getLogger(__name__)
MAX_REST_S = 1.0  # a longer stretch than a layer (a model without borders) must not make a step stand still
MIN_REST_S = 1e-4  # below it sleep(2) is mostly its own overhead: the time counts at the next border
SLICE_S = 0.02  # how long a stop may go unseen while resting


class Pace:
    """`with pace:` around one example's forward and backward pass; outside of it no hook does anything.

    rest_per_s: seconds of rest for each second of computing; 0: no hook and no wait. is_stopping: the step in
    the making is finished without rests. No value is changed by any of it, so weights come out bit for bit
    the same.
    """

    def __init__(
        self,
        rest_per_s: float,
        is_stopping: Callable[[], bool] = lambda: False,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.rest_per_s = rest_per_s
        self._is_stopping, self._clock, self._sleep = is_stopping, clock, sleep
        self._hooks: list[RemovableHandle] = []
        self._event: torch.cuda.Event | None = None
        self._is_working = False
        self._since = 0.0  # when computing began after the last rest

    def attach(self, model: nn.Module) -> Pace:
        """Makes the ends of the model's decoder layers borders."""
        if not self.rest_per_s:
            return self
        if next(model.parameters()).device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)  # the host sleeps while it waits, too
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            log.warning(
                "worker.pace: transformers marks no decoder layers in this model; rests are between examples "
                "only, of %g s at most",
                MAX_REST_S,
            )
        self._hooks = [layer.register_forward_hook(self._on_layer_done) for layer in layers]
        return self

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Pace:
        self._is_working = bool(self.rest_per_s)
        self._since = self._clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._on_border()
        self._is_working = False

    def _on_layer_done(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        """Forward; and, by a hook on what leaves the layer, the moment before its backward pass begins.

        Recomputation (activation checkpointing) ends with the last tensor that backward needs, before this.
        """
        if not self._is_working:
            return
        self._on_border()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: Tensor) -> None:
        self._on_border()

    def _on_border(self) -> None:
        if not self._is_working or self._is_stopping():
            return
        if self._event is not None:
            self._event.record()
            self._event.synchronize()
        rest_s = min(self.rest_per_s * (self._clock() - self._since), MAX_REST_S)
        if rest_s < MIN_REST_S:
            return
        until = self._clock() + rest_s
        while not self._is_stopping() and (left_s := until - self._clock()) > 0:
            self._sleep(min(left_s, SLICE_S))
        self._since = self._clock()
