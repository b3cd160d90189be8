"""What one training step allocates, from the model's configuration alone: a step of tensors without memory.

The step runs under FakeTensorMode, which knows every shape and computes nothing, and each new storage is
counted from its birth to its death: activations, gradients and temporaries are those that the code makes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_worker.model.hf_model import build_model, parameter_names
from apollo_worker.step.forward import enable_activation_checkpointing, read_head
from apollo_worker.step.loss import target_loss

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
# Of one parameter -> bytes that its update needs for a moment, beside weight, gradient and state.
Temporaries = Callable[[Tensor], int]


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Beside weights and optimizer state. activation_bytes: alive between forward and backward."""

    activation_bytes: int
    peak_bytes: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, for as long as they live.

    of_product: what a product of bf16 of that m, k, n takes for a moment beside its result.
    """

    def __init__(self, of_product: Callable[[int, int, int], int] | None = None) -> None:
        super().__init__()
        self._of_product = of_product
        self._known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        # autograd adds two gradients of one tensor in place, but not where they are fake: there it drops both
        # at once. A sum of what is kept is seen by whatever comes next.
        if func is not torch.ops.aten.add.Tensor:
            self.reserve(self._extra(func, args))
        return result

    def ignore(self, tensor: Tensor) -> None:
        """It was there before, and stays."""
        self._known.add(tensor.untyped_storage()._cdata)

    def reserve(self, num_bytes: int) -> None:
        """What lives for a moment beside all that lives now."""
        self.peak = max(self.peak, self.live + num_bytes)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += num_bytes
        weakref.finalize(storage, self._drop, key, num_bytes)

    def _extra(self, func: Any, args: Any) -> int:
        if self._of_product is None or func not in _PRODUCTS:
            return 0
        a, b = args[-2:]
        rows, inner = a.shape[-2:]
        return self._of_product(rows, inner, b.shape[-1]) if a.dtype == torch.bfloat16 else 0

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


@dataclasses.dataclass
class _Kind:
    """Layers that are alike. kept_bytes: what is alive after one beside what was before it."""

    layers: list[GradientCheckpointingLayer]
    kept_bytes: int = 0
    num_outputs: int | None = None  # of a tuple; None: one tensor


class StepSimulator:
    """One model without memory, at one number of tokens; `run` once with and once without checkpointing.

    Of each kind of layer one runs for real, the others are stand-ins that keep as many bytes alive: Qwen3.5's
    64 layers of 2,048 tokens are some 500,000 operators, each of them 100 us also without memory.
    """

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype,
        num_tokens: int,
        chunk_tokens: int,
        of_product: Callable[[int, int, int], int] | None = None,
    ):
        self.model, self._of_product = build_model(model_dir, dtype), of_product
        self._num_tokens, self._chunk_tokens = num_tokens, chunk_tokens
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fill()
        self.model.eval()
        self._kinds = kinds_of_layers(self.model)

    def run(self, checkpointing: bool, temporaries: Temporaries, held_elements: int = 0) -> StepMemory:
        """held_elements: of gradients that wait for one another (Backend.take)."""
        self._use_checkpointing(checkpointing)
        self._measure_kinds()
        # While the last layer of a kind runs backward, what the others keep is still alive; while the first
        # one does, the others' gradients wait.
        found = [self._run(slice(-1, None), temporaries, held_elements)]
        if held_elements:
            found.append(self._run(slice(1), temporaries, held_elements))
        return StepMemory(found[0].activation_bytes, max(one.peak_bytes for one in found))

    def _run(self, real: slice, temporaries: Temporaries, held_elements: int) -> StepMemory:
        """real: which layers of each kind are no stand-ins."""
        counter = self._counter()
        held: list[Tensor] = []

        def update(parameter: Tensor) -> None:
            """The optimizer in backward: a gradient lives until its parameter is updated."""
            assert parameter.grad is not None
            counter.reserve(temporaries(parameter))
            gradient, parameter.grad = parameter.grad, None
            if gradient.numel() <= held_elements:
                held.append(gradient)
            if sum(one.numel() for one in held) > held_elements:
                held.clear()

        def update_all(layer: nn.Module) -> None:
            """Of a stand-in: its gradients, one after the other."""
            for parameter in layer.parameters():
                parameter.grad = torch.empty_like(parameter)
                update(parameter)

        for kind in self._kinds:
            self._stand_in(kind, kind.layers[real], update_all)
        hooks = [p.register_post_accumulate_grad_hook(update) for p in self.model.parameters()]
        with self._mode, counter, torch.enable_grad():
            if (head := read_head(self.model)) is None:
                logits = self.model(input_ids=self._ids(), use_cache=False).logits[0, :-1]
                kept = counter.live
                loss = nn.functional.cross_entropy(logits.float(), self._ids()[0, 1:])
                del logits
            else:
                hidden = self._hidden()
                kept = counter.live
                targets = self._ids()[0, 1:]
                hidden = hidden[0][torch.arange(len(targets))]
                layer, options = head.layer, head.options(self._chunk_tokens)
                loss = target_loss(hidden, layer.weight, layer.bias, targets, **options)
                del hidden
            loss.backward()
        for hook in hooks:
            hook.remove()
        return StepMemory(kept, counter.peak)

    def _fill(self) -> None:
        """Every parameter and buffer as a fake tensor of a CPU, whose attention keeps what a GPU's keeps."""
        with self._mode:
            for first, group in parameter_names(self.model).items():
                declared = self.model.get_parameter(first)
                parameter = nn.Parameter(torch.empty(declared.shape, dtype=declared.dtype))
                for name in group:
                    owner, _, attribute = name.rpartition(".")
                    self.model.get_submodule(owner)._parameters[attribute] = parameter
        for name, buffer in list(self.model.named_buffers()):
            owner, _, attribute = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[attribute] = self._mode.from_tensor(buffer)

    def _use_checkpointing(self, wanted: bool) -> None:
        if wanted:
            enable_activation_checkpointing(self.model)
        elif self.model.supports_gradient_checkpointing:
            self.model.gradient_checkpointing_disable()

    def _ids(self) -> Tensor:
        return torch.zeros(1, self._num_tokens, dtype=torch.int64)

    def _hidden(self) -> Tensor:
        return self.model.base_model(input_ids=self._ids(), use_cache=False).last_hidden_state

    def _counter(self) -> LiveBytes:
        counter = LiveBytes(self._of_product)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            counter.ignore(tensor)
        return counter

    def _measure_kinds(self) -> None:
        """By what is alive when the next layer begins: the input of a layer may be gone by then, or kept."""
        counter = self._counter()
        begun: list[tuple[nn.Module, int]] = []  # (layer, bytes alive when it began), in the order they run
        hooks = []
        for kind in self._kinds:
            self._stand_in(kind, kind.layers[:2])
            for layer in kind.layers:
                hooks.append(
                    layer.register_forward_pre_hook(lambda layer, _: begun.append((layer, counter.live)))
                )
            hooks.append(kind.layers[0].register_forward_hook(partial(_learn_outputs, kind)))
        with self._mode, counter, torch.enable_grad():
            self._hidden()
        for hook in hooks:
            hook.remove()
        kept = {layer: after - at for (layer, at), (_, after) in pairwise(begun)}
        for kind in self._kinds:
            # Not the first: the model may hold on to what went into it. The very last stands for no other.
            kind.kept_bytes = kept.get(kind.layers[:2][-1], 0)

    def _stand_in(
        self,
        kind: _Kind,
        real: list[GradientCheckpointingLayer],
        on_backward: Callable[[nn.Module], None] = lambda layer: None,
    ) -> None:
        for layer in kind.layers:
            layer.__dict__.pop("forward", None)
            if not any(layer is one for one in real):
                layer.forward = partial(_stand_in_forward, kind, partial(on_backward, layer))


def _learn_outputs(kind: _Kind, layer: nn.Module, arguments: Any, output: Any) -> None:
    kind.num_outputs = len(output) if isinstance(output, tuple) else None


def kinds_of_layers(model: PreTrainedModel) -> list[_Kind]:
    """The layers of every list of layers, by class, shapes of parameters and the configuration's word."""
    words = getattr(model.config, "layer_types", None) or []
    found: dict[Any, _Kind] = {}
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        for i, layer in enumerate(stack):
            if isinstance(layer, GradientCheckpointingLayer):
                shapes = tuple((n, tuple(p.shape)) for n, p in layer.named_parameters())
                word = words[i] if len(words) == len(stack) else None
                found.setdefault((name, type(layer), shapes, word), _Kind([])).layers.append(layer)
    return list(found.values())


def _stand_in_forward(kind: _Kind, on_backward: Callable[[], None], *args: Any, **kwargs: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    output = _StandIn.apply(hidden, kind.kept_bytes, on_backward)
    return output if kind.num_outputs is None else (output, *[None] * (kind.num_outputs - 1))


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, kept_bytes: int, on_backward: Callable[[], None]) -> Tensor:
        ctx.on_backward = on_backward
        ctx.kept = torch.empty(max(0, kept_bytes), dtype=torch.uint8)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        ctx.kept = None
        ctx.on_backward()
        return torch.empty_like(grad_outputs[0]), None, None
