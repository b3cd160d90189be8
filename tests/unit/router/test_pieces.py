"""What a rank's loader does to a checkpoint tensor, as boxes; whole models laid out as vLLM does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from apollo_router.pieces import derive_pieces, joined, without_changed
from apollo_router.views import record_loading
from sharded_model import ServedRanks
from test_views import SHARD_DTYPES, Loading, random
from torch import nn

from apollo_ipc.checkpoint.shards import ShardTensor
from apollo_ipc.demo import models
from apollo_ipc.manifest import Manifest, Piece, Pieces


def derive(
    model: nn.Module, checkpoint: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Pieces], dict[str, str]]:
    described = {
        name: ShardTensor(name, "model.safetensors", SHARD_DTYPES[t.dtype], list(t.shape), 0, t.nbytes)
        for name, t in checkpoint.items()
    }
    found, refused = derive_pieces(record_loading(model, described), dict(model.named_parameters()))
    return found, {refusal.name: refusal.reason for refusal in refused}


def box(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(piece.start, piece.shape, strict=True))


def assert_hold_what_is_loaded(model: nn.Module, checkpoint: Mapping[str, torch.Tensor]) -> dict[str, Pieces]:
    found, refused = derive(model, checkpoint)
    assert not refused
    with torch.no_grad():
        model.load_weights((name, tensor.clone()) for name, tensor in checkpoint.items())
    for name, pieces in found.items():
        for piece in pieces.pieces:
            held = model.get_parameter(piece.tensor).data
            live = torch.as_strided(held, piece.shape, piece.stride, held.storage_offset() + piece.offset)
            assert torch.equal(live, checkpoint[name][box(piece)].to(live.dtype)), name
    return found


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def test_columns_of_a_row_parallel_layer_are_one_piece():
    def load(model, name, loaded):
        model.weight.data.copy_(loaded.narrow(1, 5, 5))

    found = assert_hold_what_is_loaded(Loading(load, weight=zeros(4, 5)), {"w": random(4, 10)})
    assert found["w"].pieces == [Piece("weight", [0, 5], [4, 5], [5, 1], 0)]


def test_bands_of_a_merged_projection_stay_apart():
    def load(model, name, loaded):
        for at, start in enumerate((2, 6, 12)):
            model.weight.data.narrow(0, 2 * at, 2).copy_(loaded.narrow(0, start, 2))

    found = assert_hold_what_is_loaded(Loading(load, weight=zeros(6, 3)), {"w": random(16, 3)})
    assert [piece.start for piece in found["w"].pieces] == [[2, 0], [6, 0], [12, 0]]


def test_neighbours_become_one_in_any_order():
    def load(model, name, loaded):
        for row in (3, 1, 2, 0):
            for half in (2, 0):
                model.weight.data[row, half : half + 2].copy_(loaded[row + 4, half : half + 2])

    found = assert_hold_what_is_loaded(Loading(load, weight=zeros(4, 4)), {"w": random(8, 4)})
    assert found["w"].pieces == [Piece("weight", [4, 0], [4, 4], [4, 1], 0)]


def test_the_same_elements_at_two_places_are_two_pieces():
    def load(model, name, loaded):
        model.first.data.copy_(loaded)
        model.second.data[2:4].copy_(loaded[:2])

    found = assert_hold_what_is_loaded(
        Loading(load, first=zeros(3, 2), second=zeros(4, 2)), {"w": random(3, 2)}
    )
    assert [piece.tensor for piece in found["w"].pieces] == ["first", "second"]


def test_a_rank_that_holds_nothing_of_a_tensor_says_nothing_of_it():
    def load(model, name, loaded):
        if name == "rows":
            model.weight.data[:0].copy_(loaded.narrow(0, 4, 0))  # padding only

    found, refused = derive(Loading(load, weight=zeros(4, 2)), {"rows": random(4, 2), "other": random(3, 3)})
    assert (found, refused) == ({}, {})


def test_one_expert_is_a_box_of_rows_and_flattened_dimensions_are_seen_through():
    def load(model, name, loaded):
        if name == "e":
            model.w13.data[1].narrow(0, 3, 3).copy_(loaded.narrow(0, 3, 3))
        else:
            model.flat.data.copy_(loaded[1:3].flatten())

    model = Loading(load, w13=zeros(2, 6, 5), flat=zeros(12))
    found = assert_hold_what_is_loaded(model, {"e": random(6, 5), "f": random(4, 2, 3)})
    assert found["f"].pieces == [Piece("flat", [1, 0, 0], [2, 2, 3], [6, 3, 1], 0)]


@pytest.mark.parametrize("way", ["every second row", "a part of flattened rows", "turned"])
def test_what_is_no_box_is_refused_or_is_turned(way: str):
    def load(model, name, loaded):
        if way == "every second row":
            model.weight.data.copy_(loaded[::2])
        elif way == "turned":
            model.weight.data.copy_(loaded[:3, :2].t())
        else:
            model.weight.data.flatten()[:6].copy_(loaded.flatten()[1:7])

    model = Loading(load, weight=zeros(2, 3))
    if way == "turned":
        assert_hold_what_is_loaded(model, {"w": random(4, 3)})
    else:
        assert "another order" in derive(model, {"w": random(4, 3)})[1]["w"]


def test_a_tensor_of_which_vllm_changed_one_place_is_refused_whole():
    found = {"w": Pieces([2], [Piece("a", [0], [1], [0], 0), Piece("b", [1], [1], [0], 0)])}
    kept, refused = without_changed(found, {"b": "repacked"})
    assert kept == {}
    assert (refused[0].name, refused[0].reason, refused[0].blocks) == ("w", "repacked", False)
    assert without_changed(found, {"c": "repacked"}) == (found, [])


def test_pieces_that_overlap_or_go_back_in_memory_are_not_joined():
    rows = [Piece("a", [0, 0], [1, 2], [0, 1], 4), Piece("a", [1, 0], [1, 2], [0, 1], 2)]
    assert joined(rows) == rows
    overlap = [Piece("a", [0], [3], [1], 0), Piece("a", [2], [3], [1], 2)]
    assert joined(overlap) == overlap


# --- whole models ---

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
MODELS = {
    "qwen3": {},
    "llama": {"vocab_size": 331, "num_key_value_heads": 1},  # padding, and heads that each rank has
    "qwen3.5": {"num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4},
}


def covered(manifests: list[Manifest], name: str) -> torch.Tensor:
    """How often each element of a checkpoint tensor lies in some rank's memory."""
    shape = next(m.pieces[name].shape for m in manifests if name in m.pieces)
    count = torch.zeros(shape, dtype=torch.int8)
    for manifest in manifests:
        for piece in manifest.pieces[name].pieces if name in manifest.pieces else ():
            count[box(piece)] += 1
    return count


@pytest.mark.parametrize(
    ("arch", "num_ranks", "spreads_experts"),
    [(arch, 2, False) for arch in MODELS] + [("qwen3_moe", 2, True), ("qwen3", 4, False)],
)
def test_the_ranks_together_hold_every_element_of_a_model(
    tmp_path: Path, arch: str, num_ranks: int, spreads_experts: bool
):
    model_dir = models.make_model(tmp_path / "model", arch, **{**SMALL, **MODELS[arch]})
    ranks = ServedRanks(model_dir, num_ranks, spreads_experts=spreads_experts)
    checkpoint = ranks.models[0].checkpoint
    assert not [r for manifest in ranks.manifests for r in manifest.refused]
    assert {name for manifest in ranks.manifests for name in manifest.pieces} == checkpoint.keys()
    for name in checkpoint:
        assert covered(ranks.manifests, name).min() >= 1, name
    for rank, manifest in zip(ranks.models, ranks.manifests, strict=True):
        for name, pieces in manifest.pieces.items():
            for piece in pieces.pieces:
                held = rank.get_parameter(piece.tensor).data
                live = held.as_strided(piece.shape, piece.stride, held.storage_offset() + piece.offset)
                assert torch.equal(live, checkpoint[name][box(piece)].to(live.dtype)), name
    del held, live
    ranks.close()
