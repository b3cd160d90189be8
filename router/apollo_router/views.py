"""Where each checkpoint tensor lands in the loaded model, found by replaying the model's own `load_weights`.

The replay feeds meta tensors (a shape without data) under a dispatch mode that writes nothing and notes every
copy into a live tensor: from which checkpoint tensor, which of its elements, to which address. No model's
dimensions or fusions are written anywhere in this project; vLLM's loader is the one that knows them.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_ipc.checkpoint import ShardTensor
from apollo_ipc.manifest import Refusal, View
from apollo_router.derived import storage_of

aten = torch.ops.aten
Place = TypeVar("Place")
INTO_A_BUFFER = "vLLM loads it into a buffer, not into a parameter"
IN_ANOTHER_ORDER = "vLLM stores its elements in another order than the checkpoint"
# safetensors' names; any other is a quantized format, whose tensors only need a shape to be told apart
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Copies that keep the elements and their order: what comes out stands for what went in.
_SAME_ELEMENTS = {aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default}


@dataclasses.dataclass(frozen=True)
class Copy:
    """`dst[...] = src[...]` into a live tensor. Offsets and strides in elements."""

    dst_storage: int  # identity of the live storage
    dst_offset: int
    dst_stride: tuple[int, ...]
    src_offset: int
    src_stride: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass
class Recording:
    """What a replay saw: copies by checkpoint name, and names whose data arrived changed."""

    shapes: dict[str, tuple[int, ...]]
    copies: dict[str, list[Copy]]
    derived: dict[str, str]  # checkpoint name -> how it was changed on the way
    error: str | None = None


def record_loading(model: nn.Module, checkpoint: Mapping[str, ShardTensor]) -> Recording:
    """Replays `model.load_weights` for the names and shapes of `checkpoint`; the model is unchanged."""
    sources = {
        name: torch.empty(tuple(t.shape), dtype=_DTYPES.get(t.dtype, torch.uint8), device="meta")
        for name, t in checkpoint.items()
    }
    recording = Recording({n: tuple(t.shape) for n, t in sources.items()}, defaultdict(list), {})
    live = {storage_of(t) for t in _all_tensors(model)}
    with torch.no_grad(), _Recorder(sources, live, recording):
        try:
            model.load_weights(iter(sources.items()))  # pyright: ignore[reportCallIssue]
        except Exception as error:  # vLLM serves on; the manifest says why nothing is shared
            recording.error = f"{type(error).__name__}: {error}"
    return recording


def _all_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


class _Recorder(TorchDispatchMode):
    def __init__(self, sources: Mapping[str, torch.Tensor], live: set[int], recording: Recording):
        super().__init__()
        self._recording = recording
        self._live = live
        # meta storage -> (checkpoint name, element of it at the storage's start)
        self._origin = {storage_of(t): (name, 0) for name, t in sources.items()}
        self._changed: dict[int, tuple[str, str]] = {}  # meta storage -> (name, operation that changed it)
        self._kept: list[torch.Tensor] = list(sources.values())  # a freed storage's address would be reused
        self._scalar_from: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.copy_.default and self._is_live(args[0]):
            self._note(args[0], args[1])
            return args[0]
        if func is aten._local_scalar_dense.default and self._name_of(args[0]):
            # vLLM's default loader reads one-element weights with .item() and fills them in.
            self._scalar_from = self._name_of(args[0])
            return 0.0
        if func._schema.is_mutable and (target := self._live_target(func, args, kwargs)) is not None:
            if func is aten.fill_.Scalar and self._scalar_from and target.numel() == 1:
                self._note_scalar(target)
            return target  # padding filled with zeros and the like: not ours to write
        if func is aten.clone.default and self._name_of(args[0]) and not args[0].is_contiguous():
            # A turned tensor that is made contiguous (gpt-oss's experts): with the strides that it had it
            # says where each element comes from, and every view of it does.
            return aten.alias.default(args[0])
        if func is aten._unsafe_view.default and self._name_of(args[0]) and not args[0].is_contiguous():
            # `reshape` of such a copy: elements in an order for which there are no strides.
            return self._in_another_order(args[0], args[1])
        if func is aten._to_copy.default and self._name_of(args[0]):
            kwargs = {**kwargs, "device": torch.device("meta")}
        out = func(*args, **kwargs)
        self._follow(func, args, out)
        return out

    def _in_another_order(self, tensor: torch.Tensor, shape: Any) -> torch.Tensor:
        out = torch.empty(shape, dtype=tensor.dtype, device="meta")
        self._kept.append(out)
        self._changed[storage_of(out)] = self._origin[storage_of(tensor)][0], "aten::reshape"
        return out

    def _is_live(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and storage_of(tensor) in self._live

    def _live_target(self, func, args, kwargs) -> torch.Tensor | None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and self._is_live(value):
                return value
        return next((v for k, v in kwargs.items() if k == "out" and self._is_live(v)), None)

    def _name_of(self, tensor: Any) -> str | None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
            return None
        origin = self._origin.get(storage_of(tensor))
        return origin[0] if origin else None

    def _follow(self, func, args, out) -> None:
        """Notes for new meta storages which checkpoint tensor they came from, and whether still as it was."""
        if not isinstance(out, torch.Tensor) or out.device.type != "meta":
            return
        key = storage_of(out)
        if key in self._origin or key in self._changed:
            return
        inputs = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        for tensor in inputs:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
                continue
            source = storage_of(tensor)
            if source in self._origin:
                name, start = self._origin[source]
                self._kept.append(out)
                if func in _SAME_ELEMENTS and tensor.is_contiguous() and out.is_contiguous():
                    self._origin[key] = (name, start + int(tensor.storage_offset()))
                else:
                    self._changed[key] = (name, func.name())
                return
            if source in self._changed:
                self._kept.append(out)
                self._changed[key] = self._changed[source]
                return

    def _note(self, dst: torch.Tensor, src: Any) -> None:
        if not isinstance(src, torch.Tensor) or src.device.type != "meta":
            return
        key = storage_of(src)
        if key in self._changed:
            name, operation = self._changed[key]
            self._recording.derived[name] = operation
            return
        if key not in self._origin:
            return
        name, start = self._origin[key]
        src = src.expand(dst.shape) if src.shape != dst.shape else src
        self._recording.copies[name].append(
            Copy(
                dst_storage=storage_of(dst),
                dst_offset=int(dst.storage_offset()),
                dst_stride=dst.stride(),
                src_offset=start + src.storage_offset(),
                src_stride=src.stride(),
                shape=tuple(dst.shape),
            )
        )

    def _note_scalar(self, dst: torch.Tensor) -> None:
        name, self._scalar_from = self._scalar_from, None
        assert name is not None
        self._recording.copies[name].append(Copy(storage_of(dst), int(dst.storage_offset()), (), 0, (), ()))


def derive_views(
    recording: Recording, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, View], list[Refusal]]:
    """Checkpoint name -> view of a live parameter, for each tensor whose elements land once at fixed strides.

    `parameters`: vLLM's name -> parameter, with the addresses that the recording saw.
    The refusals name each tensor that was loaded in another way; tensors that no copy touched (a tied
    lm_head, a vision tower that is not served) appear in neither.
    """
    return placed(recording, parameters, _affine_view)


def placed(
    recording: Recording, parameters: Mapping[str, nn.Parameter], find: Callable[..., Place | str]
) -> tuple[dict[str, Place], list[Refusal]]:
    """Checkpoint name -> what `find(shape, copies, tensor by storage, parameters)` makes of its copies, or a
    refusal with the reason that it gives."""
    if recording.error:
        return {}, [Refusal("*", f"replaying the model's load_weights failed: {recording.error}")]
    by_storage: dict[int, str] = {}
    for name, parameter in parameters.items():
        by_storage.setdefault(storage_of(parameter), name)
    found: dict[str, Place] = {}
    refused: list[Refusal] = []
    for name, shape in recording.shapes.items():
        if name in recording.derived:
            reason = (
                f"vLLM loads a changed copy of it ({recording.derived[name]}); it would not follow training"
            )
            refused.append(Refusal(name, reason, blocks=False))
        elif copies := recording.copies.get(name):
            place = find(shape, copies, by_storage, parameters)
            if isinstance(place, str):
                refused.append(Refusal(name, place, blocks=False))
            else:
                found[name] = place
    return found, refused


def _affine_view(
    shape: tuple[int, ...],
    copies: list[Copy],
    by_storage: Mapping[int, str],
    parameters: Mapping[str, nn.Parameter],
) -> View | str:
    """One (offset, stride) that explains every copy of one checkpoint tensor, else the reason why not."""
    if len({c.dst_storage for c in copies}) > 1:
        return "vLLM keeps it in more than one tensor; only one of them would be trained"
    tensor = by_storage.get(copies[0].dst_storage)
    if tensor is None:
        return INTO_A_BUFFER
    copies = list(dict.fromkeys(copies))  # the same part loaded twice counts once
    numel = product(shape)
    if sum(product(c.shape) for c in copies) != numel:
        return "vLLM holds only a part of it, or parts of it twice"
    stride: list[int | None] = [None] * len(shape)
    for copy in copies:
        if not _solve_strides(shape, copy, stride):
            return IN_ANOTHER_ORDER
    known = _fill_unit_dims(shape, stride)
    starts = {c.dst_offset - _dst_distance(shape, known, c.src_offset) for c in copies}
    if len(starts) != 1:
        return IN_ANOTHER_ORDER
    return View(tensor, list(shape), known, starts.pop() - int(parameters[tensor].storage_offset()))


def contiguous_stride(shape: tuple[int, ...]) -> list[int]:
    stride = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        stride[i] = stride[i + 1] * shape[i + 1]
    return stride


def _solve_strides(shape: tuple[int, ...], copy: Copy, stride: list[int | None]) -> bool:
    """Fills `stride` (of the view, per checkpoint dimension) with what `copy` tells; False: contradiction."""
    source = contiguous_stride(shape)
    for size, src, dst in zip(copy.shape, copy.src_stride, copy.dst_stride, strict=True):
        if size == 1:
            continue
        candidates = [d for d in range(len(shape)) if source[d] == src and shape[d] > 1]
        if not candidates:
            return False
        dim, left, step = candidates[-1], size, dst
        while True:  # a copied dimension may be several of the checkpoint's, flattened
            if stride[dim] not in (None, step):
                return False
            stride[dim] = step
            if left <= shape[dim]:
                break
            if left % shape[dim] or dim == 0:
                return False
            left, step, dim = left // shape[dim], step * shape[dim], dim - 1
    return True


def _fill_unit_dims(shape: tuple[int, ...], stride: list[int | None]) -> list[int]:
    """Dimensions that no copy walked along (size 1, or one row a copy) get the packed stride."""
    filled = list(stride)
    for dim in range(len(shape) - 1, -1, -1):
        if filled[dim] is None:
            inner = filled[dim + 1] if dim + 1 < len(shape) else None
            filled[dim] = 1 if inner is None else inner * shape[dim + 1]
    return [s for s in filled if s is not None]


def _dst_distance(shape: tuple[int, ...], stride: list[int], src_offset: int) -> int:
    """How far from the view's start the element with flat checkpoint index `src_offset` lies."""
    distance = 0
    for extent, step in zip(contiguous_stride(shape), stride, strict=True):
        index, src_offset = divmod(src_offset, extent)
        distance += index * step
    return distance


def product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
