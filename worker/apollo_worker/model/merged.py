"""Parameters that transformers makes of several checkpoint tensors in loading (a layer's experts in one) or
cuts out of one, as views of the memory in which those tensors lie.

vLLM merges them too, and mostly in the same way. So transformers' own converters are run in a mode in which
nothing is copied: what comes out of them is the parameter, in vLLM's memory. No model's name is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, dot_natural_key, revert_weight_conversion

from apollo_worker.model.hf_model import NameRules
from apollo_worker.model.live_tensor import LiveTensor, Pieced


class Merged(NamedTuple):
    """tensor: the parameter's; sources: the checkpoint tensors that lie in it, or that it is a part of."""

    tensor: LiveTensor
    sources: list[str]


class Group(NamedTuple):
    """Checkpoint tensors, each with the pattern that it matches, of one converter's application."""

    converter: WeightConverter
    sources: list[tuple[str, str]]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.sources]


def groups_of(model: PreTrainedModel, names: set[str]) -> dict[str, Group]:
    """First parameter that a converter makes -> what it makes it of, of the checkpoint's `names`."""
    rules = NameRules(model)
    found: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):  # transformers' own order
        own, pattern = rules.own_name(name)
        if pattern is not None and name not in rules.declared:
            found.setdefault(own, Group(rules.converter(pattern), [])).sources.append((name, pattern))
    return found


def merged_parameters(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], missing: list[str]
) -> dict[str, Merged]:
    """Those of the parameters `missing` that are views of `tensors` (checkpoint name -> tensor).

    The others' parts lie apart, or in another order than transformers merges them in, or are not there.
    """
    found: dict[str, Merged] = {}
    for own, group in groups_of(model, set(tensors)).items():
        try:
            made = _as_views(model, own, group, tensors)
        except NotOneView:
            continue
        found |= {name: Merged(tensor, group.names) for name, tensor in made.items() if name in missing}
    return {n: m for n, m in found.items() if m.tensor.shape == model.get_parameter(n).shape}


def merge_in_own_memory(model: PreTrainedModel, tensors: dict[str, Tensor], missing: list[str]) -> None:
    """Moves tensors of `tensors` so that those of the parameters `missing` become views of them.

    transformers' way back cuts the checkpoint's tensors out of each merged one. Where it does not (nothing is
    moved then) `merged_parameters` will not find the parameter.
    """
    for own, group in groups_of(model, set(tensors)).items():
        first = tensors[group.names[0]]
        if own not in missing or any(tensors[name].dtype != first.dtype for name in group.names):
            continue
        whole = torch.empty(model.get_parameter(own).shape, dtype=first.dtype, device=first.device)
        for name, place in _cut_out(model, own, group, whole, tensors).items():
            tensors[name] = place.copy_(tensors[name])


def merged_pieces(
    model: PreTrainedModel, tensors: Mapping[str, Pieced], missing: list[str]
) -> dict[str, Merged]:
    """Those of the parameters `missing` of which `tensors` (checkpoint name -> its pieces) are parts: their
    own pieces. By transformers' way back, like `merge_in_own_memory`, on the meta device."""
    found: dict[str, Merged] = {}
    for own, group in groups_of(model, set(tensors)).items():
        dtype = tensors[group.names[0]].dtype
        if own not in missing or any(tensors[name].dtype != dtype for name in group.names):
            continue
        whole = torch.empty(model.get_parameter(own).shape, dtype=dtype, device="meta")
        cut = _cut_out(model, own, group, whole, tensors)
        if cut and all(_is_view_of(whole, place) for place in cut.values()):
            parts = [part for name, place in cut.items() for part in tensors[name].parts_within(place)]
            found[own] = Merged(Pieced(whole.shape, parts), group.names)
    return found


def _cut_out(
    model: PreTrainedModel, own: str, group: Group, whole: Tensor, tensors: Mapping[str, LiveTensor]
) -> dict[str, Tensor]:
    """The group's checkpoint tensors as transformers cuts them out of the parameter `own` (its memory:
    `whole`); empty where it does not."""
    try:
        with AsViews():
            cut = revert_weight_conversion(model, {own: whole})
    except NotOneView:
        return {}
    # By order: a checkpoint's names may have a prefix that the way back does not know.
    places = [cut[name] for name in sorted(cut, key=dot_natural_key)]
    if [place.shape for place in places] != [tensors[name].shape for name in group.names]:
        return {}
    return dict(zip(group.names, places, strict=True))


def _is_view_of(whole: Tensor, place: Tensor) -> bool:
    return place.untyped_storage()._cdata == whole.untyped_storage()._cdata


def _as_views(
    model: PreTrainedModel, own: str, group: Group, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Raises NotOneView."""
    converter = deepcopy(group.converter)
    for name, pattern in group.sources:
        converter.add_tensor(own, name, pattern, tensors[name])  # pyright: ignore[reportArgumentType]
    with AsViews():
        made: Mapping[str, Any] = converter.convert(own, model=model, config=model.config)
    values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
    memory = tensors[group.names[0]].untyped_storage().data_ptr()
    if any(value.untyped_storage().data_ptr() != memory for value in values.values()):
        raise NotOneView  # a converter that computes has copied something
    return values


class NotOneView(Exception):
    """The parts do not lie where one tensor would have them."""


class AsViews(TorchFunctionMode):
    """Inside, stacking and concatenating gives a view of where the parts lie already, or NotOneView."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.stack, torch.cat):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return (_stacked if func is torch.stack else _concatenated)(list(args[0]), dim)
        if func is torch.Tensor.contiguous:
            return args[0]
        return func(*args, **kwargs)


def _stacked(tensors: list[Tensor], dim: int) -> Tensor:
    first, steps = tensors[0], _steps(tensors)
    if len(set(steps)) > 1 or min(steps, default=1) <= 0 or any(t.shape != first.shape for t in tensors):
        raise NotOneView
    shape, stride = list(first.shape), list(first.stride())
    dim %= len(shape) + 1
    shape.insert(dim, len(tensors))
    stride.insert(dim, steps[0] if steps else first.numel())
    return torch.as_strided(first, shape, stride, first.storage_offset())


def _concatenated(tensors: list[Tensor], dim: int) -> Tensor:
    first, shape = tensors[0], list(tensors[0].shape)
    dim %= len(shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    if any([*t.shape[:dim], *t.shape[dim + 1 :]] != [*shape[:dim], *shape[dim + 1 :]] for t in tensors):
        raise NotOneView
    if _steps(tensors) != [t.shape[dim] * first.stride(dim) for t in tensors[:-1]]:
        raise NotOneView
    return torch.as_strided(first, shape, first.stride(), first.storage_offset())


def _steps(tensors: list[Tensor]) -> list[int]:
    """From each tensor's first element to the next one's, of tensors that lie alike in one memory."""
    kinds = {(t.untyped_storage().data_ptr(), t.dtype, t.stride()) for t in tensors}
    if len(kinds) > 1:
        raise NotOneView
    return [int(after.storage_offset() - before.storage_offset()) for before, after in pairwise(tensors)]
