"""Steps on weights that ranks hold in pieces, against the same on weights in one memory: bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from apollo_worker.commands.memory_plan import gathered_bytes
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import LiveModel, attach
from apollo_worker.model.live_tensor import Pieced, whole
from apollo_worker.optimizer import cpu
from apollo_worker.step.forward_fp32 import logprobs_in_fp32
from apollo_worker.step.step import Trainer
from served_model import mapped_weights
from sharded_model import ServedRanks

from apollo_ipc.config import Train
from apollo_ipc.demo import models

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"vocab_size": 331, "num_key_value_heads": 1},  # padding, and heads that each rank has
    "qwen3.5": {"num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4},
}
EXAMPLES = [
    TokenisedExample([256, 72, 105, 33, 258, 90, 91], [False, False, True, True, True, True, True]),
    TokenisedExample([256, 65, 66, 67], [False, True, True, True]),
    TokenisedExample([7, 8, 9, 10, 11, 12], [False, True, True, False, True, True]),
]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., LiveModel]]:
    """`served(arch, num_ranks)`: the model that is attached to that many; always the same weights."""
    ranks: list[ServedRanks] = []
    attached: list[LiveModel] = []

    def serve(arch: str, num_ranks: int = 2, *, spreads_experts: bool = False, **changes: Any) -> LiveModel:
        model_dir = tmp_path / arch
        if not model_dir.exists():
            models.make_model(model_dir, arch, **{**SMALL, **MODELS[arch], **changes})
        ranks.append(ServedRanks(model_dir, num_ranks, spreads_experts=spreads_experts))
        attached.append(attach(*ranks[-1].manifests, verify=True))
        return attached[-1]

    yield serve
    for live in attached:
        if hasattr(live, "model"):  # not closed by the test
            live.close()
    for held in ranks:
        held.close()
    gc.collect()


def assert_same_weights(a: LiveModel, b: LiveModel) -> None:
    trained, other = a.trained_tensors(), b.trained_tensors()
    assert trained.keys() == other.keys()
    for name, tensor in trained.items():
        found, expected = whole(tensor), whole(other[name])
        assert torch.equal(found, expected), name
        assert found.dtype == expected.dtype
        if isinstance(tensor, Pieced):
            assert tensor.replicas_agree(found), name


def holds_nothing(live: LiveModel) -> bool:
    """Whether no parameter has memory, between steps."""
    return all(p.untyped_storage().nbytes() <= 8 for p in live.model.parameters())


@pytest.mark.parametrize(
    ("arch", "num_ranks", "spreads_experts"),
    [(arch, 2, False) for arch in MODELS] + [("qwen3_moe", 2, True), ("qwen3", 4, False)],
)
def test_three_steps_are_those_of_one_process_to_the_last_bit(served, arch, num_ranks, spreads_experts):
    parts, one = served(arch, num_ranks, spreads_experts=spreads_experts), served(arch, 1)
    assert parts.gathering is not None
    assert one.gathering is None
    before = {name: whole(tensor).clone() for name, tensor in one.trained_tensors().items()}
    trainers = Trainer(parts, Train(rank=8)), Trainer(one, Train(rank=8))
    for example in EXAMPLES:
        results = [trainer.step(example, 1e-2) for trainer in trainers]
        assert results[0] == results[1]
        assert not results[0].is_bad
        assert holds_nothing(parts)
    assert_same_weights(parts, one)
    changed = {
        name
        for name, tensor in parts.trained_tensors().items()
        if not torch.equal(whole(tensor), before[name])
    }
    assert len(changed) >= 0.9 * len(before)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"router": "freeze"},
        {"rounding": "kahan", "projection": "block_sign"},
        {"rounding": "nearest", "weight_decay": 0.1, "logit_chunk_tokens": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_option_makes_a_difference(served, options):
    parts, one = served("qwen3_moe"), served("qwen3_moe", 1)
    for live in (parts, one):
        trainer = Trainer(live, Train(rank=8, **options))
        live.losses = [trainer.step(example, 1e-2) for example in EXAMPLES]
    assert parts.losses == one.losses
    assert_same_weights(parts, one)


def test_updates_of_several_passes_and_frozen_embeddings(served):
    parts, one = served("qwen3.5"), served("qwen3.5", 1)  # recurrent: each example is a pass of its own
    trainers = [Trainer(live, Train(rank=8)) for live in (parts, one)]
    for embeddings in ("train", "freeze"):
        results = [trainer.step_on(EXAMPLES, 1e-2, embeddings=embeddings) for trainer in trainers]
        assert results[0] == results[1]
        assert holds_nothing(parts)
        assert not parts.gathering._kept
    assert_same_weights(parts, one)


def test_what_is_read_without_a_step_is_the_same(served):
    parts, one = served("llama"), served("llama", 1)
    trainers = [Trainer(live, Train(rank=8)) for live in (parts, one)]
    a, b = (trainer.logprobs_of(EXAMPLES) for trainer in trainers)
    assert all(map(torch.equal, a, b))
    assert trainers[0].mean_loss(EXAMPLES) == trainers[1].mean_loss(EXAMPLES)
    prompts = torch.tensor([[1, 2, 3, 4, 5]])
    wide = []
    for trainer in trainers:
        with trainer.live.weights_of(trainer.head.layer):
            wide.append(logprobs_in_fp32(trainer.live.model, trainer.head, prompts))
    assert torch.equal(*wide)
    assert holds_nothing(parts)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_holds_one_layers_weights_at_a_time(served, checkpointing, monkeypatch):
    monkeypatch.setattr(cpu, "CPU_HELD_ELEMENTS", 0)  # else small gradients, and their weights, wait
    live = served("qwen3", num_hidden_layers=6)
    trainer = Trainer(live, Train(rank=8, activation_checkpointing=checkpointing))
    alive: list[Any] = []
    peak = 0
    gather = Pieced.gather

    def counted(self: Pieced) -> torch.Tensor:
        nonlocal peak
        tensor = gather(self)
        alive.append((weakref.ref(tensor.untyped_storage()), tensor.nbytes))
        peak = max(peak, sum(size for storage, size in alive if storage() is not None))
        return tensor

    monkeypatch.setattr(Pieced, "gather", counted)
    trainer.step(EXAMPLES[0], 1e-2)
    gc.collect()
    assert len(alive) > 2 * len(live.names)
    assert peak < 0.5 * sum(tensor.nbytes for tensor in live.trained_tensors().values())
    assert peak <= gathered_bytes(live.model, 0) < 1.5 * peak
    assert not [size for storage, size in alive if storage() is not None]


def test_a_loss_that_is_not_finite_writes_nothing_and_keeps_nothing(served):
    live = served("qwen3")
    trainer = Trainer(live, Train(rank=8))
    name = "model.norm.weight"
    norm = live.trained_tensors()[name]
    for part in norm.parts:
        part.live.fill_(float("inf"))
    before = {n: whole(t).clone() for n, t in live.trained_tensors().items()}
    assert trainer.step(EXAMPLES[0], 1e-2).is_bad
    assert all(torch.equal(whole(t), before[n]) for n, t in live.trained_tensors().items())
    assert holds_nothing(live)


def test_a_step_that_raises_in_backward_leaves_no_memory_gathered(served):
    live = served("qwen3")
    trainer = Trainer(live, Train(rank=8))
    calls = iter(range(1000))

    def update(parameter):
        if next(calls) == 5:
            raise RuntimeError("out of memory")
        Trainer._take_gradient(trainer, parameter)

    for hook in trainer._hooks:
        hook.remove()
    for parameter in live.model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step(EXAMPLES[0], 1e-2)
    assert holds_nothing(live)
    assert not live.gathering._kept


def test_letting_go_of_the_model_lets_go_of_every_ranks_memory(served):
    live = served("qwen3")
    gc.collect()
    before = set(mapped_weights())
    held = Trainer(live, Train(rank=8))  # as a traceback may
    held.step(EXAMPLES[0], 1e-2)
    live.close()
    gone = before - set(mapped_weights())
    assert len(gone) == 2  # the two ranks' own mappings stay: they are in this process
    del held
