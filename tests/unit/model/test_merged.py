"""Experts that transformers merges in loading, as views: in memory of our own, and what is none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.experts import expert_stacks, routers
from apollo_worker.model.live_model import LiveModel, load_offline
from apollo_worker.model.merged import AsViews, NotOneView, merged_parameters
from apollo_worker.step.step import Trainer
from apollo_worker.sync.writer import CheckpointWriter
from safetensors.torch import load_file
from saved_model import assert_loads_as, bits
from torch import nn
from transformers import AutoModelForCausalLM

from apollo_ipc.config import Train
from apollo_ipc.demo import models

MERGED = ["qwen3_moe", "qwen3.5_moe", "mixtral", "olmoe", "glm4_moe", "deepseek_v3"]
STORED_SO = ["gpt_oss", "granite_moe"]  # as one tensor
EXAMPLE = TokenisedExample([256, 72, 105, 33, 258, 90, 91], [False, False, True, True, True, True, True])
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 32, "intermediate_size": 32}


def make(directory: Path, arch: str, **changes: Any) -> Path:
    return models.make_model(directory / arch, arch, **{**SMALL, **changes})


def stored_bits(model_dir: Path) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in load_file(model_dir / "model.safetensors").items()}


@pytest.mark.parametrize("arch", [*MERGED, *STORED_SO])
def test_the_checkpoints_tensors_and_the_models_parameters_are_one_memory(tmp_path: Path, arch: str) -> None:
    model_dir = make(tmp_path, arch)
    live, stored = load_offline(model_dir), load_file(model_dir / "model.safetensors")
    assert {name: bits(tensor) for name, tensor in live.trained_tensors().items()}.items() <= {
        name: bits(tensor) for name, tensor in stored.items()
    }.items()
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    expected = {name: bits(p.detach()) for name, p in loaded.named_parameters()}
    assert {name: bits(p.detach()) for name, p in live.model.named_parameters()} == expected
    with torch.no_grad():
        for name, parameter in live.model.named_parameters():
            parameter.fill_(float(len(name)))
    assert all(len(tensor.unique()) == 1 for tensor in live.trained_tensors().values())
    assert bool(live.parts) == (arch in MERGED)


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_what_is_trained_is_synced_under_the_checkpoints_names(tmp_path: Path, arch: str) -> None:
    model_dir = make(tmp_path, arch)
    before = stored_bits(model_dir)
    live = load_offline(model_dir)
    trainer = Trainer(live, Train(rank=16))
    for _ in range(5):
        assert not trainer.step(EXAMPLE, 1e-2).is_bad
    CheckpointWriter(model_dir, live.trained_tensors()).sync(weight_version=1, applied_seq=0)
    after = stored_bits(model_dir)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name] and ".experts." in name}
    assert_loads_as(model_dir, {name: p.detach() for name, p in live.model.named_parameters()})


def test_an_expert_that_no_token_chose_is_the_same_to_the_last_bit_after_steps(tmp_path: Path) -> None:
    """One token of sixty-four asked: of 8 experts two a layer are chosen at most."""
    live = load_offline(make(tmp_path, "qwen3_moe"))
    trainer = Trainer(live, Train(rank=16, weight_decay=0.1))
    chosen: set[tuple[str, int]] = set()
    for name, module in live.model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: chosen.update((name, int(e)) for e in inputs[1].unique())
            )
    before = {name: p.detach().clone() for name, p in live.model.named_parameters()}
    for _ in range(4):
        trainer.step(TokenisedExample([65, 66], [False, True]), 1e-2)
    stacks = [name for name in expert_stacks(live.model) if name.endswith(("gate_up_proj", "down_proj"))]
    num_same = 0
    for name in stacks:
        for expert, (was, now) in enumerate(
            zip(before[name], live.model.get_parameter(name).detach(), strict=True)
        ):
            is_chosen = (name.rpartition(".")[0], expert) in chosen
            assert torch.equal(was, now) != is_chosen, (name, expert)
            num_same += not is_chosen
    assert len(stacks) == 2
    assert num_same >= 4


def test_gradients_are_accumulated_for_stacks_too(tmp_path: Path) -> None:
    live = load_offline(make(tmp_path, "qwen3_moe"))
    trainer = Trainer(live, Train(rank=16))
    steps = trainer.main_optimizer.state_tensors()
    assert not trainer.step_on([EXAMPLE, TokenisedExample([65, 66], [False, True])], 1e-3).is_bad
    name = next(name for name in live.parts if "gate_up" in name)
    assert 0 < steps[f"{name}.step"].sum() <= 8
    assert steps[f"{name}.step"].max() == 1


STACKS = {
    "qwen3_moe": {"gate_up_proj", "down_proj"},
    "gpt_oss": {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"},
    "granite_moe": {"gate_up_proj", "down_proj"},
    "glm4_moe": {"gate_up_proj", "down_proj"},
    "qwen3.5_moe": {"gate_up_proj", "down_proj"},
    "qwen3.5": set(),
    "gpt2": set(),
}
ROUTERS = {
    "qwen3_moe": {"model.layers.N.mlp.gate.weight"},
    "gpt_oss": {"model.layers.N.mlp.router.weight", "model.layers.N.mlp.router.bias"},
    "granite_moe": {"model.layers.N.block_sparse_moe.router.weight"},
    "glm4_moe": {"model.layers.N.mlp.gate.weight"},
    "qwen3.5_moe": {"model.layers.N.mlp.gate.weight"},
    "qwen3.5": set(),
    "gpt2": set(),
}


@pytest.mark.parametrize("arch", STACKS)
def test_experts_and_routers_are_told_without_names(arch: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.make_config(arch))
    assert {name.rpartition(".")[2] for name in expert_stacks(model)} == STACKS[arch]
    assert {re.sub(r"\d+", "N", name) for name in routers(model)} == ROUTERS[arch]


@pytest.mark.parametrize("router", ["train", "freeze"])
def test_a_router_is_trained_or_not(tmp_path: Path, router: Any) -> None:
    live = load_offline(make(tmp_path, "qwen3_moe"))
    trainer = Trainer(live, Train(rank=8, router=router))
    before = {name: p.detach().clone() for name, p in live.model.named_parameters()}
    for _ in range(3):
        assert not trainer.step(EXAMPLE, 1e-2).is_bad
    changed = {n for n, p in live.model.named_parameters() if not torch.equal(p.detach(), before[n])}
    frozen = routers(live.model) if router == "freeze" else set()
    assert before.keys() - changed == frozen
    names = {key.rpartition(".")[0] for key in trainer.main_optimizer.state_tensors()}
    assert before.keys() - names == frozen


# --- what is one view, and what is not ---


def in_memory(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_stacking_and_concatenating_neighbours_is_the_memory_itself() -> None:
    whole = in_memory((3, 8, 5))
    gates, ups = [part[:4] for part in whole], [part[4:] for part in whole]
    with AsViews():
        merged = torch.cat([torch.stack(gates, dim=0), torch.stack(ups, dim=0)], dim=1)
        turned = merged.transpose(1, 2).contiguous()
    assert torch.equal(merged, whole)
    assert merged.data_ptr() == turned.data_ptr() == whole.data_ptr()
    assert torch.equal(turned, whole.mT)


APART = {
    "another order": lambda w: [w[1], w[0], w[2]],
    "a gap": lambda w: [w[0], w[1], w[3]],
    "one twice": lambda w: [w[0], w[0], w[0]],
    "other memory": lambda w: [w[0], w[1], w[2].clone()],
    "other strides": lambda w: [w[0], w[1].T.contiguous().T, w[2]],
    "another shape": lambda w: [w[0], w[1], w[2][:2]],
    "another dtype": lambda w: [w[0], w[1], w.view(torch.int32)[2]],
}


@pytest.mark.parametrize("kind", APART)
def test_parts_that_lie_apart_are_not_one_view(kind: str) -> None:
    parts = APART[kind](in_memory((4, 4, 4)))
    with pytest.raises(NotOneView), AsViews():
        torch.stack(parts, dim=0)


def test_up_before_gate_is_not_one_view() -> None:
    whole = in_memory((3, 8, 5))
    with pytest.raises(NotOneView), AsViews():
        torch.cat([whole[:, 4:], whole[:, :4]], dim=1)


@pytest.mark.parametrize("harm", ["swap", "copy", "drop", "none"])
def test_a_model_whose_experts_lie_otherwise_is_not_mapped(tmp_path: Path, harm: str) -> None:
    live = load_offline(make(tmp_path, "qwen3_moe"))
    own = next(name for name in live.parts if "gate_up" in name)
    tensors = dict(live.tensors)
    first, second = live.parts[own][:2]
    if harm == "swap":
        tensors[first], tensors[second] = tensors[second], tensors[first]
    elif harm == "copy":
        tensors[second] = tensors[second].clone()
    elif harm == "drop":
        del tensors[second]
    found = merged_parameters(live.model, tensors, list(live.parts))
    assert (own in found) == (harm == "none")
    assert found.keys() | {own} == live.parts.keys()


def test_a_convolution_is_no_stack_of_experts() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 4), nn.Linear(8, 8))
    assert expert_stacks(model) == set()
    assert routers(model) == set()


def test_the_checkpoint_of_a_model_that_was_loaded_live_names_every_expert(tmp_path: Path) -> None:
    live: LiveModel = load_offline(make(tmp_path, "mixtral"))
    assert live.num_parameters == len(list(live.model.parameters()))
    grids = live.grid_dtypes()
    assert grids.keys() == {name for name, _ in live.model.named_parameters()}
    assert set(grids.values()) == {torch.bfloat16}
