"""Weights that are gathered where they are used, of a model whose parameters several ranks of vLLM hold.

A parameter has a shape and no memory. It is gathered before the forward pass of the decoder layer (outside of
the layers: of the module) that it belongs to, and let go after it. What autograd would keep of it for the
backward pass is remembered as a place in it, and gathered again when it is asked for; then it stays until its
gradient is used, when the optimizer's update of the whole goes back into every rank's pieces (`opened`).
"""

# pyright: reportUnknownMemberType=false, reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_worker.model.live_tensor import Pieced


class Saved(NamedTuple):
    """What autograd keeps of a gathered parameter: which of its elements."""

    parameter: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class GatherOnUse:
    """Owns the hooks of one model. pieced: parameter -> its pieces. Not thread-safe but for `opened`."""

    def __init__(self, model: nn.Module, pieced: Mapping[nn.Parameter, Pieced]):
        self._pieced: dict[Tensor, Pieced] = {**pieced}
        self._num_users: dict[Tensor, int] = {}  # of those that are gathered for a forward pass
        self._owners: dict[int, Tensor] = {}  # address of a gathered parameter's memory -> parameter
        self._kept: dict[Tensor, Tensor] = {}  # gathered in the backward pass, until the update
        self._handles = [handle for module, own in _users(model) for handle in self._hook(module, own)]

    def _hook(
        self, module: nn.Module, own: list[nn.Parameter]
    ) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield module.register_forward_pre_hook(lambda *_: self._take(own))
        # always_call: a layer that is run again in backward ends by an exception (torch.utils.checkpoint).
        yield module.register_forward_hook(lambda *_: self._let_go(own), always_call=True)

    @torch.no_grad()
    def _take(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            num = self._num_users.get(parameter, 0)
            self._num_users[parameter] = num + 1
            if num == 0:
                parameter.data = self._gathered(parameter)
                self._owners[parameter.data_ptr()] = parameter

    def _let_go(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            num = self._num_users.pop(parameter)
            if num > 1:
                self._num_users[parameter] = num - 1
            else:
                del self._owners[parameter.data_ptr()]
                parameter.data = self._pieced[parameter].placeholder()

    def _gathered(self, parameter: Tensor) -> Tensor:
        kept = self._kept.get(parameter)
        return self._pieced[parameter].gather() if kept is None else kept

    @contextmanager
    def weights_of(self, module: nn.Module) -> Generator[None]:
        """For the block its own parameters are there: for who reads them without calling it."""
        own = list(module.parameters(recurse=False))
        self._take(own)
        try:
            yield
        finally:
            self._let_go(own)

    @contextmanager
    def forgetting(self) -> Generator[None]:
        """For a forward pass that has a backward pass: autograd keeps no gathered weights in between."""
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | Saved:
        parameter = self._owners.get(tensor.untyped_storage().data_ptr())
        if parameter is None:
            return tensor
        return Saved(parameter, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | Saved) -> Tensor:
        if not isinstance(saved, Saved):
            return saved
        with torch.no_grad():
            self._kept[saved.parameter] = kept = self._gathered(saved.parameter)
            return kept.as_strided(saved.shape, saved.stride, saved.offset)

    @contextmanager
    def opened(self, parameter: Tensor) -> Generator[Tensor]:
        """The whole weight, contiguous, to be updated in place; then it is scattered, unless that raised."""
        with torch.no_grad():
            kept = self._kept.pop(parameter, None)
            weight = self._pieced[parameter].gather() if kept is None else kept
            yield weight
            self._pieced[parameter].scatter(weight)

    def forget(self, *parameters: Tensor) -> None:
        """What is kept of these, of all without an argument: after a backward pass without an update."""
        for parameter in parameters or list(self._kept):
            self._kept.pop(parameter, None)

    def close(self) -> None:
        """Lets go of the ranks' memory; nobody may use the model any more."""
        for handle in self._handles:
            handle.remove()
        for pieced in self._pieced.values():
            pieced.parts.clear()
        self._pieced.clear()
        self._kept.clear()
        self._owners.clear()


def _users(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules at whose forward pass parameters are needed. A decoder layer may reach into its parts, so it
    gets all of them at once."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            inside.update(module.modules())
            yield module, list(module.parameters())
    for module in model.modules():
        if module not in inside and (own := list(module.parameters(recurse=False))):
            yield module, own
