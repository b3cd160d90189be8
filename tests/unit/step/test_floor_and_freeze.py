"""Targets that have no loss once they are likely enough, and embeddings that stay as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.job_plan import JobPlan
from apollo_worker.jobs.objective import Objective
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.loss import loss_of_logits, target_loss, teacher_of
from apollo_worker.step.step import Trainer

from apollo_ipc.config import Train
from apollo_ipc.demo.models import make_model

FLOOR = 0.6
TINY: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}


def logits_with(probabilities: list[float], size: int = 7) -> torch.Tensor:
    """(T, size) of which the first token has each probability."""
    rows = []
    for at, p in enumerate(probabilities):
        rest = torch.rand(size - 1, generator=torch.Generator().manual_seed(at), dtype=torch.float64) + 0.1
        rows.append(torch.cat([torch.tensor([p], dtype=torch.float64), (1 - p) * rest / rest.sum()]).log())
    return torch.stack(rows)


def test_below_its_floor_a_target_has_the_divergence_and_beyond_it_nothing():
    given = [0.05, 0.3, 0.59, 0.61, 0.99]
    logits = logits_with(given).float().requires_grad_()
    targets = torch.zeros(len(given), dtype=torch.int64)
    teacher = teacher_of(targets, None, FLOOR)
    assert teacher is not None
    loss = loss_of_logits(logits, targets, teacher=teacher, is_mean=False)
    expected = sum(
        FLOOR * math.log(FLOOR / p) + (1 - FLOOR) * math.log((1 - FLOOR) / (1 - p))
        for p in given
        if p < FLOOR
    )
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[3:].any()
    # Of the others: p - q at the target, and what is taken from the rest goes by what each of it had.
    for row, p in enumerate(given[:3]):
        rest = logits.detach()[row].double().softmax(0)[1:]
        wanted = torch.cat([torch.tensor([p - FLOOR]), rest * (1 - (1 - FLOOR) / (1 - p))])
        torch.testing.assert_close(logits.grad[row].double(), wanted.double(), rtol=1e-4, atol=1e-6)


def test_answers_that_are_held_have_no_floor():
    """Their teacher is what the model said itself, above it as below."""
    logits = logits_with([0.99, 0.99]).float().requires_grad_()
    targets = torch.zeros(2, dtype=torch.int64)
    teacher = teacher_of(targets, [None, [(0, math.log(0.5)), (1, math.log(0.3))]], FLOOR)
    assert teacher is not None
    loss_of_logits(logits, targets, teacher=teacher, is_mean=False).backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1, 0] == pytest.approx(0.49, abs=1e-5)


def test_chunks_of_the_head_have_their_own_rows_floors():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=generator)
    weight = torch.randn(7, 16, generator=generator)
    targets = torch.randint(0, 7, (9,), generator=generator)
    teacher = teacher_of(targets, None, FLOOR)
    found = [
        target_loss(hidden, weight, None, targets, teacher=teacher, is_mean=False, chunk_tokens=size)
        for size in (2, 64)
    ]
    whole = loss_of_logits(hidden @ weight.T, targets, teacher=teacher, is_mean=False)
    assert [float(one) for one in found] == pytest.approx([float(whole)] * 2, rel=1e-5)


@pytest.fixture(params=["tied", "untied"])
def trainer(request, tmp_path) -> Trainer:
    tied = request.param == "tied"
    model_dir = make_model(tmp_path / "m", "qwen3", dtype=torch.float32, tie_word_embeddings=tied, **TINY)
    return Trainer(load_offline(model_dir), Train(rank=8))


EXAMPLES = [TokenisedExample([1, 2, 3, 4, 5], [False, False, True, True, True])]


def test_frozen_embeddings_and_head_stay_and_are_trained_by_the_next_job(trainer):
    model = trainer.live.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.step_on(EXAMPLES, 1e-2, embeddings="freeze")
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == {name for name in before if "embed_tokens" in name or "lm_head" in name}
    trainer.step_on(EXAMPLES, 1e-2)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_embeddings_are_free_again_after_a_step_that_raised(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "_backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.step_on(EXAMPLES, 1e-2, embeddings="freeze")
    assert all(p.requires_grad for p in trainer.live.model.parameters())


def test_a_likely_target_is_trained_no_further(trainer):
    objective = Objective(target_probability=0.5)
    for _ in range(60):
        result = trainer.step_on(EXAMPLES, 1e-2, objective=objective)
    assert result.loss < 0.01
    found = trainer.logprobs_of(EXAMPLES)[0].exp()
    assert found.min() > 0.4
    before = trainer.mean_loss(EXAMPLES)
    assert before > 0.05, "cross entropy itself is not at its end"


def test_what_a_plan_of_before_lacks_is_as_it_was():
    plan = JobPlan(EXAMPLES, [None], 1, 1, 1e-3, 0.0, "constant", 0.1)
    assert (plan.embeddings, plan.objective.target_probability, plan.is_plain) == ("train", 1.0, True)
