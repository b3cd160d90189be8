"""Coefficients and teachers of targets against autograd over full logits in fp64, values and gradients."""

import pytest
import torch
from apollo_worker.step.loss import SoftTargets, loss_of_logits, target_loss, teacher_of

torch.set_num_threads(1)
T, H, V = 19, 16, 97  # 19 is no multiple of the chunk sizes below


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(T, H, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (T,), generator=generator)
    coefficients = torch.randn(T, generator=generator)
    assert (coefficients < 0).any()
    rows = []
    for t in range(T):
        # Of one token to 7, with nearly all of the probability or with little; a third have no teacher.
        ids = torch.randperm(V, generator=generator)[: 1 + t % 7]
        logprobs = (torch.randn(V, generator=generator) * (1 + t % 3)).log_softmax(0)[ids]
        rows.append(None if t % 3 == 2 else list(zip(ids.tolist(), logprobs.tolist(), strict=True)))
    return hidden, weight, targets, coefficients, rows


def reference(logits, targets, coefficients, rows, is_mean, floor=0.0):
    """Each term written out, for autograd to differentiate; fp64."""
    logp = logits.log_softmax(1)
    terms = []
    for t, row in enumerate(rows):
        if row is None:
            terms.append(-logp[t, targets[t]])
            continue
        ids = torch.tensor([token for token, _ in row])
        q = torch.tensor([value for _, value in row], dtype=torch.float64).exp()
        rest = torch.ones(V, dtype=torch.bool)
        rest[ids] = False
        q_rest = 1 - q.sum()
        term = (q * (q.log() - logp[t, ids])).sum()
        terms.append(term + q_rest * (q_rest.log() - logp[t, rest].logsumexp(0)))
    total = (torch.stack(terms) * coefficients.double()).sum()
    return total / len(targets) if is_mean else total


@pytest.mark.parametrize("chunk_tokens", [1, 8, 64])
@pytest.mark.parametrize("is_mean", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.25}])
def test_terms_and_gradients_are_those_of_autograd_over_full_logits(chunk_tokens, is_mean, options):
    hidden, weight, targets, coefficients, rows = inputs()
    logits = hidden @ weight.T * options.get("logit_scale", 1.0)
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    expected = reference(logits, targets, coefficients, rows, is_mean)
    right = torch.autograd.grad(expected, [hidden, weight])
    terms = {"coefficients": coefficients, "teacher": teacher_of(targets, rows), "is_mean": is_mean}
    loss = target_loss(hidden, weight, None, targets, chunk_tokens=chunk_tokens, **terms, **options)
    got = torch.autograd.grad(loss, [hidden, weight])
    # fp32 inside: logits of size up to 15 carry 6e-8 * 15 = 1e-6 each, and a sum of 19 terms some 1e-5.
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=2e-5)
    for mine, true in zip(got, right, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5 * true.abs().max().item())


def test_whole_logits_give_the_same():
    hidden, weight, targets, coefficients, rows = inputs(torch.float32)
    teacher = teacher_of(targets, rows)
    logits = (hidden @ weight.T).detach().requires_grad_()
    loss = loss_of_logits(logits, targets, coefficients=coefficients, teacher=teacher)
    expected = reference(logits.double(), targets, coefficients, rows, True)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=2e-5)
    (got,), (true,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_is_the_model_itself_costs_nothing_and_moves_nothing():
    hidden, weight, targets, _, _ = inputs(torch.float32)
    logprobs, ids = (hidden @ weight.T).detach().log_softmax(1).topk(20)
    loss = target_loss(hidden, weight, None, targets, teacher=SoftTargets(ids, logprobs))
    # The bucket is 1 minus a sum of 20 in fp32: some 1e-6 of it, squared over a bucket that is not tiny.
    assert abs(loss.item()) < 1e-6
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert gradient.abs().max() < 1e-6


def test_a_token_for_certain_is_a_target():
    hidden, weight, targets, coefficients, _ = inputs(torch.float32)
    certain = SoftTargets(targets[:, None], torch.zeros(T, 1))
    plain = target_loss(hidden, weight, None, targets, coefficients=coefficients)
    taught = target_loss(hidden, weight, None, targets, coefficients=coefficients, teacher=certain)
    torch.testing.assert_close(taught, plain, rtol=1e-6, atol=1e-6)
    assert teacher_of(targets, [None] * T) is None


def test_a_bucket_that_the_model_gives_nothing_pulls_with_at_most_its_share():
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)  # p of all others underflows to 0
    teacher = SoftTargets(torch.tensor([[0]]), torch.tensor([[-0.5]]))
    loss = loss_of_logits(logits, torch.tensor([0]), teacher=teacher)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert gradient.abs().max() <= 1
