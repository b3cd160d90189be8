"""What a model's processing after loading leaves that would not follow training: each way of it is found."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from apollo_router.derived import ParameterWatch, content_digest
from torch import nn

from apollo_ipc.manifest import Refusal


class Layer(nn.Module):
    weight: Any
    plain: Any
    view: Any
    table: torch.Tensor

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8), requires_grad=False)
        self.register_buffer("table", torch.randn(4, 8))
        self.plain = torch.randn(4, 8)


Kernel = type("Kernel", (), {"__module__": "vllm.kernel"})


def found(
    process: Callable[[Layer], object] = lambda layer: None,
    load: Callable[[Layer], object] = lambda layer: None,
) -> dict[str, Refusal]:
    model = nn.ModuleDict({"experts": Layer()})
    layer = model["experts"]
    assert isinstance(layer, Layer)
    watch = ParameterWatch(model)
    layer.weight.data.copy_(torch.arange(32.0).view(4, 8))
    load(layer)
    watch.loaded(model)
    process(layer)
    return {refusal.name: refusal for refusal in watch.refusals(model)}


def transposed(layer: Layer) -> torch.Tensor:
    return layer.weight.t().contiguous()


def held_by_a_kernel(layer: Layer) -> None:
    kernel: Any = Kernel()
    kernel.packed = {"w13": [transposed(layer)]}
    layer.__dict__["kernel"] = kernel


def held_by_a_closure(layer: Layer) -> None:
    packed = transposed(layer)
    layer.__dict__["forward_cpu"] = lambda x: x @ packed


COPIES = {
    "a plain attribute": (lambda layer: setattr(layer, "w_t", transposed(layer)), "experts.w_t"),
    "a buffer": (lambda layer: layer.register_buffer("w_t", transposed(layer)), "experts.w_t"),
    "a parameter (MLA's W_UV)": (
        lambda layer: layer.register_parameter("w_t", nn.Parameter(transposed(layer))),
        "experts.w_t",
    ),
    "a kernel's": (held_by_a_kernel, "experts.kernel.packed.w13.0"),
    "a closure's": (held_by_a_closure, "experts.forward_cpu.closure.0"),
    "a partial's": (
        lambda layer: setattr(layer, "run", functools.partial(torch.matmul, other=transposed(layer))),
        "experts.run.keywords.other",
    ),
    "an old buffer's name": (lambda layer: setattr(layer, "table", transposed(layer)), "experts.table"),
}


@pytest.mark.parametrize("when", ["in load_weights", "after loading"])
@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_weight_blocks_wherever_it_is_held_and_whenever_it_was_made(copy, when):
    make, name = COPIES[copy]
    refusals = found(load=make) if when == "in load_weights" else found(process=make)
    assert list(refusals) == [name]
    assert refusals[name].blocks


def test_what_the_model_was_made_with_and_views_of_its_parameters_are_no_copies():
    def process(layer: Layer) -> None:
        layer.table.copy_(torch.zeros(4, 8))  # a rotary table that is filled in late
        layer.view = layer.weight.data[1:]
        layer.same = layer.plain
        layer.scale, layer.index = torch.tensor([1.0]), torch.arange(9)

    assert found(process) == {}


def test_a_copy_in_the_memory_of_a_tensor_that_was_dropped_is_found():
    def process(layer: Layer) -> None:
        for _ in range(50):  # the allocator gives the freed storage out again
            layer.plain = None
            layer.plain = transposed(layer)

    assert list(found(process)) == ["experts.plain"]


def set_data(layer: Layer, data: torch.Tensor) -> None:
    layer.weight.data = data


CHANGES = {
    "permuted in place": (lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)), "in place"),
    "one value changed": (lambda layer: layer.weight.data[3, 7].add_(1e-6 + 1), "in place"),
    "moved": (lambda layer: set_data(layer, layer.weight.data.clone()), "moved"),
    "cast": (lambda layer: set_data(layer, layer.weight.data.bfloat16()), "torch.bfloat16"),
    "transposed": (lambda layer: set_data(layer, layer.weight.data.t()), "repacked"),
    "dropped": (lambda layer: layer._parameters.pop("weight"), "replaced"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_is_changed_after_loading_is_named(change):
    process, reason = CHANGES[change]
    refusals = found(process)
    assert list(refusals) == ["experts.weight"]
    assert reason in refusals["experts.weight"].reason
    assert not refusals["experts.weight"].blocks  # matters only to a model that needs it


def test_padding_that_copies_the_same_values_in_place_is_no_change():
    """vLLM 0.33 pads MoE weights and copies the result back: where nothing is padded, nothing changes."""
    assert found(lambda layer: layer.weight.data.copy_(layer.weight.data.clone())) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int32])
def test_a_digest_is_of_the_values_in_order_whatever_the_strides(dtype):
    tensor = torch.arange(3 * 5 * 7).view(3, 5, 7).to(dtype)
    strided = torch.empty(7, 5, 3, dtype=dtype).permute(2, 1, 0).copy_(tensor)
    assert strided.stride() != tensor.stride()
    assert content_digest(strided) == content_digest(tensor) != content_digest(tensor.transpose(0, 1))
    assert content_digest(tensor.to("meta")) is None
