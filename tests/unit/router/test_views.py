"""Views found by replaying `load_weights`, against what an actual load then does to the same model.

The small modules load as vLLM's do: vllm/model_executor/layers/linear.py (merged projections, fused on disk),
vocab_parallel_embedding.py (padding), models/gpt2.py (Conv1D), model_loader/weight_utils.py (scalars),
layers/mamba (A_log).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from apollo_router.views import derive_views, record_loading
from torch import nn

from apollo_ipc.checkpoint.shards import ShardTensor
from apollo_ipc.manifest import Refusal, View

SHARD_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
Load = Callable[[nn.Module, str, torch.Tensor], None]


class Loading(nn.Module):
    """Parameters `name -> tensor`, and `load(self, name, loaded)` for each checkpoint tensor."""

    def __init__(self, load: Load, **parameters: torch.Tensor):
        super().__init__()
        self._load = load
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def load_weights(self, weights) -> set[str]:
        seen = set()
        for name, loaded in weights:
            self._load(self, name, loaded)
            seen.add(name)
        return seen


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def derive(
    model: nn.Module, checkpoint: Mapping[str, torch.Tensor]
) -> tuple[dict[str, View], dict[str, Refusal]]:
    """Records and derives; every live tensor must come out of it bit for bit as it went in."""
    described = {
        name: ShardTensor(name, "model.safetensors", SHARD_DTYPES[t.dtype], list(t.shape), 0, t.nbytes)
        for name, t in checkpoint.items()
    }
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (t.data_ptr(), t.clone()) for name, t in held.items()}
    recording = record_loading(model, described)
    for name, tensor in held.items():
        address, value = before[name]
        assert tensor.data_ptr() == address
        same = torch.equal(tensor.view(torch.uint8), value.view(torch.uint8)) if tensor.dim() else True
        assert same, f"recording wrote {name}"
        assert tensor.dim() or torch.equal(tensor, value), f"recording wrote {name}"
    views, refused = derive_views(recording, dict(model.named_parameters(remove_duplicate=False)))
    return views, {refusal.name: refusal for refusal in refused}


def assert_views_hold_what_is_loaded(model: nn.Module, checkpoint: Mapping[str, torch.Tensor]) -> None:
    views, refused = derive(model, checkpoint)
    assert not refused
    assert views.keys() == checkpoint.keys()
    with torch.no_grad():
        model.load_weights((name, tensor.clone()) for name, tensor in checkpoint.items())
    for name, view in views.items():
        held = model.get_parameter(view.tensor).data
        live = torch.as_strided(held, view.shape, view.stride, held.storage_offset() + view.offset)
        assert torch.equal(live, checkpoint[name].to(live.dtype)), name


def refusal(model: nn.Module, checkpoint: Mapping[str, torch.Tensor], name: str) -> str:
    views, refused = derive(model, checkpoint)
    assert name not in views
    return refused[name].reason


# --- ways of loading that leave a view ---


def test_a_merged_projection_holds_three_views():
    rows = {"q": (0, 8), "k": (8, 4), "v": (12, 4)}

    def load(model, name, loaded):
        start, size = rows[name]
        model.qkv.data.narrow(0, start, size).copy_(loaded)

    checkpoint = {name: random(size, 6) for name, (_, size) in rows.items()}
    assert_views_hold_what_is_loaded(Loading(load, qkv=torch.zeros(16, 6, dtype=torch.bfloat16)), checkpoint)


def test_a_tensor_that_is_fused_on_disk_is_one_view_of_its_shards():
    def load(model, name, loaded):
        for start, size in ((0, 8), (8, 4), (12, 4)):
            shard = loaded.narrow(0, start, size)
            model.qkv.data.narrow(0, start, size).copy_(shard)

    checkpoint = {"qkv": random(16, 6)}
    assert_views_hold_what_is_loaded(Loading(load, qkv=torch.zeros(16, 6, dtype=torch.bfloat16)), checkpoint)


def test_a_column_shard_is_a_strided_view():
    def load(model, name, loaded):
        start = {"left": 0, "right": 5}[name]
        model.merged.data.narrow(1, start, loaded.shape[1]).copy_(loaded)

    checkpoint = {"left": random(4, 5), "right": random(4, 3)}
    assert_views_hold_what_is_loaded(
        Loading(load, merged=torch.zeros(4, 8, dtype=torch.bfloat16)), checkpoint
    )


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (8, 8)])
def test_a_transposed_conv1d_is_a_transposed_view(rows, columns):
    def load(model, name, loaded):
        model.weight.data.copy_(loaded.t())

    model = Loading(load, weight=torch.zeros(columns, rows, dtype=torch.bfloat16))
    assert_views_hold_what_is_loaded(model, {"c_fc": random(rows, columns)})


def test_a_padded_vocabulary_is_a_view_of_its_first_rows():
    def load(model, name, loaded):
        model.embed.data[: loaded.shape[0]].copy_(loaded)
        model.embed.data[loaded.shape[0] :].fill_(0)

    model = Loading(load, embed=torch.ones(64, 4, dtype=torch.bfloat16))
    assert_views_hold_what_is_loaded(model, {"embed": random(50, 4)})


def test_a_scalar_that_is_read_with_item_is_a_view():
    def load(model, name, loaded):
        model.get_parameter(name).data.fill_(loaded.item())  # default_weight_loader

    checkpoint = {"scale": torch.tensor([0.5]), "zero_dim": torch.tensor(-1.25)}
    model = Loading(load, scale=torch.zeros(1), zero_dim=torch.zeros(()))
    assert_views_hold_what_is_loaded(model, checkpoint)


@pytest.mark.parametrize("explicitly", [True, False])
def test_a_cast_to_another_dtype_is_a_view(explicitly):
    def load(model, name, loaded):
        model.A_log.data.copy_(loaded.to(torch.float32) if explicitly else loaded)

    assert_views_hold_what_is_loaded(Loading(load, A_log=torch.zeros(32)), {"A_log": random(32)})


def test_a_copy_to_the_device_on_the_way_is_seen_through():
    def load(model, name, loaded):
        model.weight.data.copy_(loaded.to("cpu").clone())

    model = Loading(load, weight=torch.zeros(4, 6, dtype=torch.bfloat16))
    assert_views_hold_what_is_loaded(model, {"weight": random(4, 6)})


def test_a_dimension_of_one_may_come_and_go():
    def load(model, name, loaded):
        model.conv.data.copy_(loaded.squeeze(1) if name == "drop" else loaded.unsqueeze(1))

    model = Loading(load, conv=torch.zeros(6, 4, dtype=torch.bfloat16))
    assert_views_hold_what_is_loaded(model, {"drop": random(6, 1, 4)})
    model = Loading(load, conv=torch.zeros(6, 1, 4, dtype=torch.bfloat16))
    assert_views_hold_what_is_loaded(model, {"add": random(6, 4)})


def test_rows_that_are_copied_one_by_one_are_one_view():
    def load(model, name, loaded):
        for row in range(loaded.shape[0]):
            model.weight.data[row].copy_(loaded[row])

    model = Loading(load, weight=torch.zeros(5, 3, dtype=torch.bfloat16))
    assert_views_hold_what_is_loaded(model, {"weight": random(5, 3)})


def test_a_tied_tensor_is_a_view_and_one_that_is_not_loaded_is_neither_view_nor_refusal():
    def load(model, name, loaded):
        if name == "embed":
            model.embed.data.copy_(loaded)

    model = Loading(load, embed=torch.zeros(8, 4, dtype=torch.bfloat16))
    model.lm_head = model.embed
    views, refused = derive(model, {"embed": random(8, 4), "visual": random(3, 3)})
    assert views["embed"].tensor == "embed"
    assert "visual" not in views
    assert not refused


@pytest.mark.parametrize("part", [slice(None), slice(1, 3)])
def test_experts_that_are_turned_through_a_contiguous_copy_are_a_turned_view(part):
    def load(model, name, loaded):
        model.w13.data[part].copy_(loaded[part].permute(0, 2, 1).contiguous())  # models/gpt_oss.py

    model = Loading(load, w13=torch.zeros(4, 6, 5, dtype=torch.bfloat16))
    checkpoint = {"gate_up_proj": random(4, 5, 6)}
    if part == slice(None):
        assert_views_hold_what_is_loaded(model, checkpoint)
    else:
        assert "only a part" in refusal(model, checkpoint, "gate_up_proj")


def test_experts_that_are_copied_one_by_one_into_halves_are_a_view_each():
    def load(model, name, loaded):
        expert, half = int(name[-1]), name[:-1]
        model.w13.data[expert].narrow(0, {"gate": 0, "up": 3}[half], 3).copy_(loaded)

    checkpoint = {f"{half}{expert}": random(3, 5) for half in ("gate", "up") for expert in range(4)}
    assert_views_hold_what_is_loaded(
        Loading(load, w13=torch.zeros(4, 6, 5, dtype=torch.bfloat16)), checkpoint
    )


# --- ways that do not ---


def test_an_order_that_a_turned_copy_is_given_afterwards_is_refused():
    def load(model, name, loaded):
        model.w13.data.copy_(loaded.permute(0, 2, 1).contiguous().reshape(4, 5, 6))

    model = Loading(load, w13=torch.zeros(4, 5, 6, dtype=torch.bfloat16))
    assert refusal(model, {"w": random(4, 5, 6)}, "w")


def test_a_value_that_is_computed_on_the_way_is_refused():
    def load(model, name, loaded):
        model.A.data.copy_(-torch.exp(loaded.float()))

    reason = refusal(Loading(load, A=torch.zeros(32)), {"A_log": random(32)}, "A_log")
    assert "changed copy" in reason
    assert "would not follow training" in reason


def test_a_value_that_is_added_to_is_refused():
    def load(model, name, loaded):
        model.norm.data.copy_(loaded + 1)  # a norm that is stored around zero

    model = Loading(load, norm=torch.zeros(8, dtype=torch.bfloat16))
    assert "changed copy" in refusal(model, {"norm": random(8)}, "norm")


def test_an_interleaved_reorder_is_refused():
    def load(model, name, loaded):
        half = loaded.shape[0] // 2
        model.weight.data[0::2].copy_(loaded[:half])
        model.weight.data[1::2].copy_(loaded[half:])

    model = Loading(load, weight=torch.zeros(8, 4, dtype=torch.bfloat16))
    assert "another order" in refusal(model, {"weight": random(8, 4)}, "weight")


def test_rows_in_reverse_order_are_refused():
    def load(model, name, loaded):
        for row in range(loaded.shape[0]):
            model.weight.data[-1 - row].copy_(loaded[row])

    model = Loading(load, weight=torch.zeros(5, 3, dtype=torch.bfloat16))
    assert "another order" in refusal(model, {"weight": random(5, 3)}, "weight")


def test_a_reorder_through_a_contiguous_copy_is_refused():
    def load(model, name, loaded):
        model.weight.data.copy_(loaded.view(2, 4, 3).transpose(0, 1).reshape(8, 3))

    model = Loading(load, weight=torch.zeros(8, 3, dtype=torch.bfloat16))
    assert refusal(model, {"weight": random(8, 3)}, "weight")


def test_a_tensor_that_lands_in_two_parameters_is_refused():
    def load(model, name, loaded):
        model.first.data.copy_(loaded)
        model.second.data.copy_(loaded)

    zeros = torch.zeros(4, 3, dtype=torch.bfloat16)
    model = Loading(load, first=zeros.clone(), second=zeros.clone())
    assert "more than one tensor" in refusal(model, {"weight": random(4, 3)}, "weight")


def test_replicated_heads_are_refused():
    def load(model, name, loaded):
        model.kv.data[:4].copy_(loaded)
        model.kv.data[4:].copy_(loaded)

    model = Loading(load, kv=torch.zeros(8, 3, dtype=torch.bfloat16))
    assert "twice" in refusal(model, {"k": random(4, 3)}, "k")


def test_a_tensor_of_which_only_a_part_is_loaded_is_refused():
    def load(model, name, loaded):
        model.weight.data.copy_(loaded[:4])

    model = Loading(load, weight=torch.zeros(4, 3, dtype=torch.bfloat16))
    assert "only a part" in refusal(model, {"weight": random(8, 3)}, "weight")


def test_one_part_loaded_twice_does_not_stand_for_the_other():
    def load(model, name, loaded):
        model.weight.data[:4].copy_(loaded[:4])
        model.weight.data[:4].copy_(loaded[:4])

    model = Loading(load, weight=torch.zeros(8, 3, dtype=torch.bfloat16))
    assert refusal(model, {"weight": random(8, 3)}, "weight")


def test_a_tensor_that_lands_in_a_buffer_is_refused():
    def load(model, name, loaded):
        model.statistics.copy_(loaded)

    model = Loading(load, weight=torch.zeros(2))
    model.register_buffer("statistics", torch.zeros(6))
    assert "into a buffer" in refusal(model, {"statistics": random(6, dtype=torch.float32)}, "statistics")


def test_a_loader_that_fails_refuses_everything_and_writes_nothing():
    def load(model, name, loaded):
        model.weight.data.copy_(loaded)
        raise KeyError("unknown layer")

    model = Loading(load, weight=torch.ones(4, 3, dtype=torch.bfloat16))
    views, refused = derive(model, {"weight": random(4, 3)})
    assert views == {}
    assert "unknown layer" in refused["*"].reason
    assert refused["*"].blocks
