"""Each loss against autograd of its formula as the papers write it, in fp64."""

from __future__ import annotations

import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.objective import Objective, advantages_of
from apollo_worker.step.loss import target_loss
from apollo_worker.step.objectives import (
    Policy,
    cispo,
    dpo,
    dro,
    importance_sampling,
    kl_to_reference,
    kto,
    ppo,
)
from apollo_worker.step.update import make_update

T = 64
CLIP = (0.2, 0.28)


def drawn(num: int = T, scale: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, generator=generator, dtype=torch.float64) * scale


LOGP, SAMPLED, ADVANTAGES, REFERENCE = -2 + drawn(), -2 + drawn(seed=1), drawn(seed=2), -2 + drawn(seed=3)


def plain_ppo(logp):
    ratio = torch.exp(logp - SAMPLED)
    clipped = torch.clamp(ratio, 0.8, 1.28)
    return -torch.min(ratio * ADVANTAGES, clipped * ADVANTAGES)


def plain_cispo(logp):
    return -torch.clamp(torch.exp(logp - SAMPLED), 0.8, 1.28).detach() * ADVANTAGES * logp


@pytest.mark.parametrize(
    ("mine", "formula"),
    [
        (
            lambda logp: importance_sampling(logp, SAMPLED, ADVANTAGES),
            lambda logp: -torch.exp(logp - SAMPLED) * ADVANTAGES,
        ),
        (lambda logp: ppo(logp, SAMPLED, ADVANTAGES, CLIP), plain_ppo),
        (lambda logp: cispo(logp, SAMPLED, ADVANTAGES, CLIP), plain_cispo),
        (
            lambda logp: dro(logp, SAMPLED, ADVANTAGES, 0.05),
            lambda logp: -(logp * ADVANTAGES - 0.5 * 0.05 * (logp - SAMPLED) ** 2),
        ),
        (
            lambda logp: kl_to_reference(logp, REFERENCE),
            lambda logp: torch.exp(REFERENCE - logp) - (REFERENCE - logp) - 1,
        ),
    ],
)
def test_a_target_has_the_value_and_slope_of_the_formula(mine, formula):
    logp = LOGP.clone().requires_grad_()
    value = formula(logp)
    (slope,) = torch.autograd.grad(value.sum(), logp)
    got = mine(LOGP)
    # fp64 in two orders: a few times 2**-52 of numbers around 1.
    torch.testing.assert_close(got.value, value.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(got.slope, slope, rtol=0, atol=1e-14)


def test_ppo_has_all_four_cases():
    """Clipped and not, for good and bad tokens: else the comparison above says little."""
    ratio = (LOGP - SAMPLED).exp()
    slopes = ppo(LOGP, SAMPLED, ADVANTAGES, CLIP).slope
    high, low = ratio > 1.28, ratio < 0.8
    for is_good in (ADVANTAGES > 0, ADVANTAGES < 0):
        assert (is_good & high).any()
        assert (is_good & low).any()
    assert torch.equal(slopes == 0, (high & (ADVANTAGES > 0)) | (low & (ADVANTAGES < 0)))


def test_a_pair_has_the_value_and_slopes_of_dpo():
    chosen, rejected = (drawn(9, 20.0, seed).requires_grad_() for seed in (4, 5))
    value = -torch.log(torch.sigmoid(0.1 * chosen - 0.1 * rejected))
    slopes = torch.autograd.grad(value.sum(), [chosen, rejected])
    got = dpo(chosen.detach(), rejected.detach(), 0.1)
    torch.testing.assert_close(got.value, value.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(got.slope, slopes[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(-got.slope, slopes[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_labels_have_the_value_and_slope_of_kto(shift):
    """The point is a mean above 0, or held at 0."""
    moved, unlike = drawn(9, 20.0, 6).requires_grad_(), drawn(5, 5.0, 7) + shift
    is_good = torch.arange(9) % 3 != 0
    point = unlike.mean().clamp(min=0)
    good, bad = torch.sigmoid(0.1 * (moved - point)), torch.sigmoid(0.1 * (point - moved))
    value = 1 - torch.where(is_good, good, bad)
    (slope,) = torch.autograd.grad(value.sum(), moved)
    got = kto(moved.detach(), is_good, unlike, 0.1)
    torch.testing.assert_close(got.value, value.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(got.slope, slope, rtol=1e-13, atol=1e-14)


def test_an_advantage_is_a_reward_less_its_groups_mean():
    assert advantages_of([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    assert advantages_of([0.1] * 3) == [0.0] * 3, "exactly, whatever the mean is rounded to"


# --- the whole loss, through a head, against autograd over both sequences' logits ---

H, V = 12, 61


class Bag:
    """A model whose hidden state at a target is what `hidden` says; fp64."""

    def __init__(self, lengths: list[int]):
        self.hidden = [drawn(num * H, 1.0, 10 + i).reshape(num, H) for i, num in enumerate(lengths)]
        self.weight = drawn(V * H, 0.5, 9).reshape(V, H).requires_grad_()
        self.targets = [torch.arange(num) * 7 % V for num in lengths]

    def logp(self, i: int) -> torch.Tensor:
        rows = (self.hidden[i] @ self.weight.T).log_softmax(1)
        return rows.gather(1, self.targets[i][:, None])[:, 0]

    def examples(self, **fields) -> list[TokenisedExample]:
        made = []
        for i, targets in enumerate(self.targets):
            own = {name: values[i] for name, values in fields.items()}
            made.append(TokenisedExample([0, *targets.tolist()], [False] + [True] * len(targets), **own))
        return made

    def gradient(self, update) -> tuple[float, torch.Tensor]:
        """What step_on computes of the update: value and gradient of the head."""
        total, value = torch.zeros_like(self.weight), 0.0
        by_id = {id(row.example): row for row in update.rows}
        for i, one in enumerate(self.of):
            if (row := by_id.get(id(one))) is None:
                continue
            loss = target_loss(
                self.hidden[i], self.weight, None, self.targets[i],
                coefficients=row.coefficients, policy=row.policy, is_mean=False, chunk_tokens=5,
            )  # fmt: skip
            value += float(loss.detach())
            total += torch.autograd.grad(loss, self.weight)[0]
        return value if update.loss is None else update.loss, total

    def update(self, examples, objective, reference, is_mean=True):
        self.of = examples
        now = [self.logp(i).detach().float() for i in range(len(examples))]
        return make_update(examples, objective, is_mean=is_mean, reference=reference, logprobs=lambda _: now)


def close(got: tuple[float, torch.Tensor], loss: torch.Tensor, weight: torch.Tensor) -> None:
    (true,) = torch.autograd.grad(loss, weight)
    # Log-probabilities of size 4 in fp32 carry 2.4e-7 each, sums of 20 of them some 1e-6; so does the slope.
    assert got[0] == pytest.approx(loss.item(), abs=2e-6)
    torch.testing.assert_close(got[1], true, rtol=0, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("is_mean", [True, False])
def test_pairs_one_sequence_at_a_time_have_the_gradient_of_dpo_over_both(is_mean):
    bag = Bag([5, 8, 6, 6])
    examples = bag.examples(label=[True, False, True, False])
    reference = [bag.logp(i).detach().float() + drawn(1, 0.3, 20 + i).float() for i in range(4)]
    update = bag.update(examples, Objective("dpo", 0.5), reference, is_mean)
    moved = [bag.logp(i).sum() - reference[i].double().sum() for i in range(4)]
    losses = [-torch.nn.functional.logsigmoid(0.5 * (moved[i] - moved[i + 1])) for i in (0, 2)]
    total = sum(losses)
    close(bag.gradient(update), total / 2 if is_mean else total, bag.weight)


def test_labels_one_sequence_at_a_time_have_the_gradient_of_kto():
    bag = Bag([5, 8, 6, 4])
    examples = bag.examples(label=[True, None, False, None])
    reference = [bag.logp(i).detach().float() + drawn(1, 0.3, 30 + i).float() for i in range(4)]
    update = bag.update(examples, Objective("kto", 0.5), reference)
    moved = [bag.logp(i).sum() - reference[i].double().sum() for i in range(4)]
    point = ((moved[1] + moved[3]) / 2).clamp(min=0).detach()
    loss = (2 - torch.sigmoid(0.5 * (moved[0] - point)) - torch.sigmoid(0.5 * (point - moved[2]))) / 2
    close(bag.gradient(update), loss, bag.weight)


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("has_sampler", [True, False])
def test_a_group_has_the_gradient_of_grpo_over_all_its_tokens(has_sampler, kl):
    bag, rewards = Bag([5, 9, 6]), advantages_of([1.0, 0.0, 0.5])
    sampled = [(bag.logp(i).detach() + drawn(len(bag.targets[i]), 0.4, 40 + i)).tolist() for i in range(3)]
    examples = bag.examples(
        advantages=[[value] * len(bag.targets[i]) for i, value in enumerate(rewards)],
        logprobs=sampled if has_sampler else [None] * 3,
    )
    reference = [bag.logp(i).detach().float() + drawn(1, 0.3, 50 + i).float() for i in range(3)]
    objective = Objective("grpo", clip=CLIP, kl_to_reference=kl)
    update = bag.update(examples, objective, reference)
    terms = []
    for i, value in enumerate(rewards):
        logp = bag.logp(i)
        old = torch.tensor(sampled[i], dtype=torch.float64) if has_sampler else logp.detach()
        ratio = (logp - old).exp()
        term = -torch.min(ratio * value, ratio.clamp(0.8, 1.28) * value)
        away = reference[i].double() - logp
        terms.append(term + kl * (away.exp() - away - 1))
    close(bag.gradient(update), torch.cat(terms).mean(), bag.weight)


def test_weights_and_advantages_multiply():
    bag = Bag([6])
    weights = [1.0, 0.5, 2.0, 1.0, 1.0, -1.0]
    examples = bag.examples(advantages=[[0.5] * 6], logprobs=[[-3.0] * 6], weights=[weights])
    update = bag.update(examples, Objective("importance_sampling"), None)
    ratio = (bag.logp(0) + 3.0).exp()
    close(bag.gradient(update), (-ratio * 0.5 * torch.tensor(weights)).mean(), bag.weight)


def test_a_policy_takes_its_rows_by_the_chunk():
    policy = Policy(Objective("ppo", clip=CLIP), SAMPLED, ADVANTAGES, REFERENCE)
    whole = policy.term(LOGP, slice(None))
    part = policy.term(LOGP[10:20], slice(10, 20))
    assert torch.equal(part.value, whole.value[10:20])
    assert torch.equal(part.slope, whole.slope[10:20])
