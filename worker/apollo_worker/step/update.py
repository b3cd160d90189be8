"""What each sequence of one update is multiplied with: from its job's loss, before any backward pass."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.objective import COUPLED, Objective
from apollo_worker.step.objectives import Policy, dpo, kto

Logprobs = Callable[[Sequence[TokenisedExample]], list[Tensor]]


class Row(NamedTuple):
    """A sequence that is trained. coefficients: (T,) fp32, of its targets' terms; policy: what they are terms
    of where that is no entropy; target_probability: from where on a target has no loss."""

    example: TokenisedExample
    coefficients: Tensor
    policy: Policy | None = None
    target_probability: float = 1.0


class Update(NamedTuple):
    """loss: of a coupled loss, whose rows' terms have its slopes alone; else it is the sum of the terms."""

    rows: list[Row]
    loss: float | None = None


def make_update(
    examples: Sequence[TokenisedExample],
    objective: Objective,
    *,
    is_mean: bool,
    reference: Sequence[Tensor] | None,
    logprobs: Logprobs,
) -> Update:
    """reference: (T,) of each example, by the weights before the job, where the objective needs it; logprobs:
    gives the same by the weights as they are."""
    if objective.loss in COUPLED:
        assert reference is not None
        now = logprobs(examples)
        moved = torch.stack([(a - b).double().sum() for a, b in zip(now, reference, strict=True)])
        couple = _dpo if objective.loss == "dpo" else _kto
        return couple(examples, objective, is_mean, moved)
    num_targets = sum(one.num_targets for one in examples)
    rows: list[Row] = []
    for at, one in enumerate(examples):
        # Of grpo each target counts the same, however long its answer is (DAPO, arXiv:2503.14476, eq. 8).
        num = num_targets if objective.loss == "grpo" else one.num_targets * len(examples)
        weights = torch.ones(one.num_targets) if one.weights is None else torch.tensor(one.weights)
        policy = _policy(one, objective, None if reference is None else reference[at])
        coefficients = weights * (1 / num if is_mean else 1.0)
        rows.append(Row(one, coefficients, policy, objective.target_probability))
    return Update(rows)


def _policy(one: TokenisedExample, objective: Objective, reference: Tensor | None) -> Policy | None:
    if one.advantages is None:
        return None
    sampled = reference if objective.is_to_reference else None
    if one.logprobs is not None:
        sampled = torch.tensor(one.logprobs)
    kept = reference if objective.kl_to_reference else None
    return Policy(objective, sampled, torch.tensor(one.advantages), kept)


def _dpo(examples: Sequence[TokenisedExample], objective: Objective, is_mean: bool, moved: Tensor) -> Update:
    """Pairs, chosen and rejected in turn. moved: (N,) log p - log p_ref of each sequence."""
    assert [one.label for one in examples] == [True, False] * (len(examples) // 2)
    term = dpo(moved[::2], moved[1::2], objective.beta)
    share = 2 / len(examples) if is_mean else 1.0
    slopes = torch.stack([term.slope, -term.slope], dim=1).flatten()
    return _coupled(examples, slopes * share, term.value.sum() * share)


def _kto(examples: Sequence[TokenisedExample], objective: Objective, is_mean: bool, moved: Tensor) -> Update:
    """Labelled ones, and between them what is only read."""
    is_read = torch.tensor([one.label is None for one in examples])
    trained = [one for one in examples if one.label is not None]
    is_good = torch.tensor([one.label is True for one in trained])
    term = kto(moved[~is_read], is_good, moved[is_read], objective.beta)
    share = 1 / len(trained) if is_mean else 1.0
    return _coupled(trained, term.slope * share, term.value.sum() * share)


def _coupled(trained: Sequence[TokenisedExample], slopes: Tensor, loss: Tensor) -> Update:
    """slopes: (N,) d loss / d log p of each sequence; a term of cross entropy is -log p."""
    rows = [
        Row(one, torch.full((one.num_targets,), -slope))
        for one, slope in zip(trained, slopes.tolist(), strict=True)
    ]
    return Update(rows, float(loss))
