"""What vLLM makes of the weights once they are loaded: repacked, moved or copied, they do not follow.

`Watch` looks at a model when it is made, when it is loaded, and when it is ready to serve. Repacking in place
(vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py) leaves address, shape and strides, so
contents are compared, and a copy may be a parameter (MLA's W_UV), a buffer, an attribute, or held by a kernel
object or a closure that a module has.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import nn

from apollo_ipc.manifest import Refusal

MAX_DEPTH = 6  # attributes of attributes: a module's kernel, its configuration, that one's scales
BLOCK_BYTES = 8 * 1024 * 1024


class ParameterWatch:
    """Made before the weights are loaded; `loaded` is called after that, `refusals` at the end."""

    def __init__(self, model: nn.Module):
        # Weak: a tensor that vLLM drops must not stay, and one that has its address later is not the same.
        self._made = [(weakref.ref(tensor), storage_of(tensor)) for _, tensor in held_tensors(model)]
        self._names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self._loaded: dict[str, tuple[tuple, str | None]] = {}

    def loaded(self, model: nn.Module) -> None:
        """Reads every parameter once (docs/manifest.md has the time that it takes)."""
        self._loaded = {name: (_layout(p), content_digest(p)) for name, p in model.named_parameters()}

    def refusals(self, model: nn.Module) -> list[Refusal]:
        """Reads every parameter a second time. A changed parameter matters only to a model that needs it;
        training would not reach what is served from a copy."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        changed = [
            Refusal(name, reason, blocks=False)
            for name, before in self._loaded.items()
            if (reason := _change(name, before, parameters.get(name)))
        ]
        own = {storage_of(parameters[name]) for name in self._names if name in parameters}
        kept = {was for ref, was in self._made if (t := ref()) is not None and storage_of(t) == was}
        copies = [
            Refusal(
                name,
                "vLLM computed this tensor while or after loading the weights; it would not follow training "
                "(MLA models: their absorbed projections are such copies)",
            )
            for name, tensor in held_tensors(model)
            if storage_of(tensor) not in own | kept
        ]
        return changed + copies


def _change(name: str, before: tuple[tuple, str | None], now: nn.Parameter | None) -> str | None:
    layout, digest = before
    hint = "; try --moe-backend triton" if "experts" in name else ""
    if now is None:
        return "vLLM replaced it after loading (quantization or a packed kernel layout)"
    if now.device.type == "meta":
        return None
    if _layout(now)[:3] != layout[:3]:
        return (
            f"vLLM repacked it after loading, from {layout[0]} {list(layout[1])} to {now.dtype} "
            f"{list(now.shape)}: the kernel reads a derived layout{hint}"
        )
    if content_digest(now) != digest:
        return f"vLLM reordered or changed its values in place after loading: a derived layout{hint}"
    if _layout(now) != layout:
        return f"vLLM moved it after loading: what held the memory before would not follow training{hint}"
    return None


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.data_ptr()


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of the storage, shared by a tensor and its views; unlike an address it exists on meta too."""
    return tensor.untyped_storage()._cdata


def content_digest(tensor: torch.Tensor) -> str | None:
    """xxh3_128 (hex) of the elements in order. None on the meta device."""
    if tensor.device.type == "meta":
        return None
    data = tensor.detach().reshape(-1).view(torch.uint8)
    digest = xxhash.xxh3_128()
    buffer = None
    for block in data.split(BLOCK_BYTES):
        if block.device.type != "cpu":
            if buffer is None:
                size = min(BLOCK_BYTES, data.numel())
                buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            block = buffer[: block.numel()].copy_(block)
        digest.update(block.numpy().data)
    return digest.hexdigest()


def held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of each floating point tensor of more than one element that a module holds: parameter,
    buffer, attribute, or in a container, closure or object of vLLM's that an attribute leads to."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        held = {k: v for k, v in vars(module).items() if k not in ("_modules", "_parameters", "_buffers")}
        for name, value in {**held, **module._parameters, **module._buffers}.items():
            yield from _reach(f"{prefix}.{name}".lstrip("."), value, seen, MAX_DEPTH)


def _reach(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if depth == 0 or id(value) in seen:
        return
    if isinstance(value, torch.Tensor):
        seen.add(id(value))
        if value.is_floating_point() and value.numel() > 1:
            yield path, value
        return
    for name, inner in _inside(value):
        seen.add(id(value))
        yield from _reach(f"{path}.{name}", inner, seen, depth - 1)


def _inside(value: Any) -> list[tuple[str, Any]]:
    """What a value leads to. Modules are visited for themselves; settings hold no weights."""
    if isinstance(value, dict):
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [(str(i), inner) for i, inner in enumerate(value)]
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, types.MethodType):
        return [("self", value.__self__)]
    if isinstance(value, types.FunctionType):
        return [("closure", _cells(value)), ("defaults", (value.__defaults__, value.__kwdefaults__))]
    module = type(value).__module__
    if isinstance(value, nn.Module | type) or module.startswith("vllm.config"):
        return []
    return list(vars(value).items()) if module.startswith("vllm") and hasattr(value, "__dict__") else []


def _cells(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return cells
