"""Gradient accumulation: one update with the mean of several examples' losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.job_plan import AdamRule, JobPlan
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.packing import PackedRow
from apollo_worker.step.step import StepResult, Trainer, VllmDied
from apollo_worker.step.update import Row
from gradients import one_each
from planned import plan_of_tokens

from apollo_ipc.config import Train
from apollo_ipc.demo.models import make_model
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import parse_train_body

# fp32 and nearest: what is compared is the gradient, not the noise of rounding.
OPTIONS = Train(rank=8, rounding="nearest", lr=1e-3)
TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
}


def example_of(seed: int, num_tokens: int = 12) -> TokenisedExample:
    ids = torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenisedExample(ids, [False] * 4 + [True] * (num_tokens - 4))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m"), "qwen3", dtype=torch.float32, **TINY)


def make_trainer(model_dir: Path) -> Trainer:
    return Trainer(load_offline(model_dir), OPTIONS)


def loss_of(trainer: Trainer, example: TokenisedExample) -> torch.Tensor:
    row = Row(example, torch.full((example.num_targets,), 1 / example.num_targets))
    return trainer.forward.loss(trainer.forward.batch_of([row]))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.live.model.named_parameters()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture
def one_a_pass(monkeypatch):
    """Each example has a pass of its own, as where no two fit into one."""
    monkeypatch.setattr("apollo_worker.step.step.packed", one_each)


@pytest.mark.usefixtures("one_a_pass")
def test_two_equal_examples_make_the_update_of_one(model_dir):
    # Halving and doubling are exact in fp32, so the two must agree bit for bit.
    alone, twice = make_trainer(model_dir), make_trainer(model_dir)
    for seed in range(3):
        example = example_of(seed)
        one, both = alone.step(example, 1e-3), twice.step_on([example, example], 1e-3)
        assert both == one
    assert not differing(weights(alone), weights(twice))
    assert differing(weights(alone), weights(make_trainer(model_dir))), "it did train"


def test_a_group_of_one_is_the_step_of_before(model_dir):
    trainer, written_out = make_trainer(model_dir), make_trainer(model_dir)
    example = example_of(0)
    result = trainer.step_on([example], 1e-3)
    # What a step on one example has always been: the optimizer's hooks and the plain loss's backward pass.
    written_out.optimizer.lr = 1e-3
    loss = loss_of(written_out, example)
    loss.backward()
    written_out.optimizer.flush()
    assert result == StepResult(loss.item(), is_bad=False)
    assert not differing(weights(trainer), weights(written_out))


def test_each_example_weighs_the_same_whatever_its_length(model_dir):
    trainer, examples = make_trainer(model_dir), [example_of(1, 8), example_of(2, 40), example_of(3, 16)]
    seen: dict[str, torch.Tensor] = {}
    names: dict[torch.Tensor, str] = {p: name for name, p in trainer.live.model.named_parameters()}
    losses = [loss_of(trainer, example) for example in examples]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(names))
    update = trainer.optimizer.update_parameter

    def remember(param: torch.Tensor) -> None:
        assert param.grad is not None
        seen[names[param]] = param.grad.clone()
        update(param)

    trainer.optimizer.update_parameter = remember
    result = trainer.step_on(examples, 1e-3)
    assert result.loss == pytest.approx(torch.stack(losses).mean().item())
    assert set(seen) == set(names.values()), "one update each"
    for (param, name), gradient in zip(names.items(), gradients, strict=True):
        # fp32 sums in another order: some 2**-24 of the largest element for each of the few hundred terms.
        error = float((seen[name] - gradient).abs().max())
        assert error <= 1e-5 * float(gradient.abs().max()) + 1e-9, name
        assert param.grad is None


@pytest.mark.usefixtures("one_a_pass")
@pytest.mark.parametrize("bad_at", [0, 1, 2])
def test_a_loss_that_is_not_finite_leaves_the_whole_group_unwritten(model_dir, monkeypatch, bad_at):
    trainer = make_trainer(model_dir)
    before, examples = weights(trainer), [example_of(seed) for seed in range(3)]
    real, calls = trainer.forward.loss, []

    def loss(*inputs: Any) -> torch.Tensor:
        calls.append(None)
        return real(*inputs) * (float("nan") if len(calls) == bad_at + 1 else 1.0)

    monkeypatch.setattr(trainer.forward, "loss", loss)
    assert trainer.step_on(examples, 1e-3).is_bad
    assert not differing(before, weights(trainer))
    assert all(p.grad is None for p in trainer.live.model.parameters()), "nothing is left for the next step"
    monkeypatch.undo()
    fresh = make_trainer(model_dir)
    assert trainer.step_on(examples, 1e-3) == fresh.step_on(examples, 1e-3)
    assert not differing(weights(trainer), weights(fresh)), "the next group is trained as if nothing was"


@pytest.mark.usefixtures("one_a_pass")
def test_an_error_in_the_middle_of_a_group_leaves_no_gradient_and_the_optimizer_in_backward(model_dir):
    trainer, examples = make_trainer(model_dir), [example_of(seed) for seed in range(3)]
    before = weights(trainer)
    bad = TokenisedExample([10**6] * 8, [True] * 8)  # out of the vocabulary
    with pytest.raises(IndexError):
        trainer.step_on([examples[0], bad, examples[1]], 1e-3)
    assert not differing(before, weights(trainer))
    assert all(p.grad is None for p in trainer.live.model.parameters())
    trainer.step(examples[2], 1e-3)
    fresh = make_trainer(model_dir)
    fresh.step(examples[2], 1e-3)
    assert not differing(weights(trainer), weights(fresh))


def test_the_cost_is_told_and_refused_where_a_gpu_has_no_room(model_dir, monkeypatch):
    trainer = make_trainer(model_dir)
    short, long = plan_of_tokens([1, 2, 3, 4], accumulate_steps=4), long_plan(4)
    assert trainer.prepare_accumulation(short) == [], "they share a pass"
    (note,) = trainer.prepare_accumulation(long)
    in_gb = f"{4 * sum(p.numel() for p in trainer.live.model.parameters()) / 1e9:.3g} GB more"
    assert note == f"gradient accumulation over 4 passes keeps all gradients: {in_gb}"
    monkeypatch.setattr(type(trainer.live), "device", torch.device("cuda"))
    monkeypatch.setattr("apollo_worker.step.step.free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="an update of 4 passes keeps all gradients") as refused:
        trainer.prepare_accumulation(long)
    assert refused.value.code == "not_enough_memory"


def test_where_a_gpu_has_no_room_a_short_example_is_padded_into_the_pass_of_a_long_one(
    model_dir, monkeypatch
):
    trainer = make_trainer(model_dir)
    mixed = msgspec.structs.replace(
        plan_of_tokens([1, 2], accumulate_steps=2), examples=[example_of(1, 40), example_of(2, 10)]
    )
    (note,) = trainer.prepare_accumulation(mixed)
    assert "over 2 passes" in note
    apart, other = trainer.step_on(mixed.examples, 1e-3), make_trainer(model_dir)
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(type(trainer.live), "device", torch.device("cuda"))
        on_gpu.setattr("apollo_worker.step.step.free_bytes", lambda device: 1000)
        assert other.prepare_accumulation(mixed) == [
            "an update's examples are padded into one pass: there is no room for the gradients of 2"
        ]
    calls = []
    real = other._backward
    monkeypatch.setattr(
        other, "_backward", lambda rows, layout: calls.append(len(layout)) or real(rows, layout)
    )
    together = other.step_on(mixed.examples, 1e-3)
    assert calls == [2]
    assert together.loss == pytest.approx(apart.loss, rel=1e-5)  # fp32, another order of its sums
    for name, weight in weights(other).items():
        assert torch.allclose(weight, weights(trainer)[name], rtol=1e-3, atol=1e-5), name
    assert len(other.prepare_accumulation(mixed)) == 1, "the next job is looked at anew"
    assert "over 2 passes" in other.prepare_accumulation(mixed)[0]


@pytest.mark.usefixtures("one_a_pass")
def test_hundreds_of_examples_weigh_alike_in_bf16(tmp_path):
    """In a bf16 sum the 257th equal term is less than half of the sum's last bit, and lost."""
    directory = make_model(tmp_path / "m", "qwen3", dtype=torch.bfloat16, **TINY)
    trainer = Trainer(load_offline(directory), OPTIONS)
    one = example_of(1, 6)
    seen: list[dict[torch.Tensor, torch.Tensor]] = []

    def remember(param: torch.Tensor) -> None:
        assert param.grad is not None
        seen[-1][param], param.grad = param.grad.float(), None

    trainer.optimizer.update_parameter = remember
    for num in (1, 512):  # the loss of each is halved nine times, which is exact
        seen.append({})
        trainer.step_on([one] * num, 1e-3)
    for param, alone in seen[0].items():
        # 512 equal terms of bf16 sum up exactly in fp32: 8 + 9 of its 24 bits.
        assert torch.equal(seen[1][param], alone)


@pytest.mark.usefixtures("one_a_pass")
def test_nothing_is_written_after_vllm_has_ended_whichever_example_reached_the_parameter(
    model_dir, monkeypatch
):
    trainer, alive = make_trainer(model_dir), True
    monkeypatch.setattr(type(trainer.live), "is_alive", lambda self: alive)
    unreached = trainer.live.model.get_parameter("model.norm.weight")
    before, real = weights(trainer), trainer._backward

    def backward(rows: Sequence[Row], layout: Sequence[PackedRow]) -> float:
        """The last example reaches nothing, as an expert that it is not sent to; then vLLM ends."""
        nonlocal alive
        if trainer._is_last:
            alive = False
            return 1.0
        return real(rows, layout)

    monkeypatch.setattr(trainer, "_backward", backward)
    with pytest.raises(VllmDied):
        trainer.step_on([example_of(0), example_of(1)], 1e-3)
    assert not differing(before, weights(trainer))
    assert unreached.grad is None
    assert not trainer._sum.parameters()


def test_a_gradient_that_waited_when_a_step_was_cut_off_is_in_no_later_one(model_dir):
    trainer = make_trainer(model_dir)
    before, update = weights(trainer), trainer.optimizer.update_parameter
    names: dict[torch.Tensor, str] = {p: name for name, p in trainer.live.model.named_parameters()}

    def fail_at_the_first_layer(param: torch.Tensor) -> None:
        if names[param].startswith("model.layers.0."):
            raise VllmDied("vLLM has ended")
        update(param)

    trainer.optimizer.update_parameter = fail_at_the_first_layer
    with pytest.raises(VllmDied):
        trainer.step(example_of(0), 1e-3)
    assert not differing(before, weights(trainer)), "on a CPU all of so small a model's wait"
    trainer.optimizer.update_parameter = update
    fresh = make_trainer(model_dir)
    assert trainer.step(example_of(1), 1e-3) == fresh.step(example_of(1), 1e-3)
    assert not differing(weights(trainer), weights(fresh))


@pytest.mark.usefixtures("one_a_pass")
def test_what_only_an_earlier_example_reached_is_updated_too(model_dir, monkeypatch):
    trainer, real = make_trainer(model_dir), Trainer._backward
    before = weights(trainer)
    monkeypatch.setattr(trainer, "_backward", lambda *args: 1.0 if trainer._is_last else real(trainer, *args))
    trainer.step_on([example_of(0), example_of(1)], 1e-3)
    assert differing(before, weights(trainer)) == list(before)


def long_plan(accumulate_steps: int) -> JobPlan:
    """Examples of which no two fit into one pass."""
    examples = [example_of(seed, OPTIONS.max_tokens) for seed in range(accumulate_steps)]
    made = plan_of_tokens(list(range(accumulate_steps)), accumulate_steps=accumulate_steps)
    return msgspec.structs.replace(made, examples=examples)


# --- the request ---


def body(**options: Any) -> bytes:
    return msgspec.json.encode({"examples": [{"prompt": "a", "completion": "b"}], "options": options})


def test_the_option_is_read_and_a_wrong_one_names_its_field():
    assert parse_train_body(body(accumulate_steps=4)).options.accumulate_steps == 4
    with pytest.raises(UserError, match="Expected `int` >= 1") as refused:
        parse_train_body(body(accumulate_steps=0))
    assert refused.value.field == "options.accumulate_steps"
    with pytest.raises(UserError, match="did you mean 'accumulate_steps'"):
        parse_train_body(body(acumulate_steps=4))


def test_a_jobs_own_betas_and_eps_hold_for_its_steps_alone(model_dir):
    """Three steps, the middle one with betas of its own, are those of an optimizer that is set to them by
    hand; without them the middle one is another step."""
    own, example = AdamRule(0.5, 0.6, 1e-3), example_of(1)
    told, by_hand, plain = (make_trainer(model_dir) for _ in range(3))
    for number in range(3):
        is_own = number == 1
        told.step_on([example], 1e-3, adam=own if is_own else None)
        plain.step_on([example], 1e-3)
        by_hand.options = (
            msgspec.structs.replace(OPTIONS, beta1=0.5, beta2=0.6, eps=1e-3) if is_own else OPTIONS
        )
        by_hand.step_on([example], 1e-3)
    assert differing(weights(told), weights(by_hand)) == []
    assert differing(weights(told), weights(plain)) != []
