"""The loss at target positions, in chunks, with the gradient computed in the forward pass.

    loss = sum over targets of  coefficient_t * f_t, divided by their number where the mean is asked for
    f_t = -log p(target_t)                                  a target that is a token (`cross_entropy`)
    f_t = KL(teacher_t || model_t)                          one with a teacher's top-k (`distillation`)
    f_t = a function of log p(target_t)                     one with an advantage (`objectives.Policy`)

Full fp32 logits of 2,048 tokens over Qwen3.5's vocabulary of 248,320 take 2 GB, and autograd keeps several
such tensors. Here logits exist only for the positions that are trained on, `chunk_tokens` of them at a
time, and are gone before the next chunk. Legend: T = target tokens, H = hidden size, V = vocabulary, K = how
many of a teacher's log-probabilities are kept for a target, C = targets of a chunk.

Memory beside inputs: about 2 * chunk_tokens * V * 4 bytes, T * H * 4 for the hidden gradient, and, where
the head is trained, its gradient and at most as much again for the slopes of a block of targets. Sums over
several blocks are fp32, since a bf16 sum drops what later ones add: V * H * 4 bytes more.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apollo_worker.step.objectives import Policy

IGNORED = -100  # label of a position that is not trained on, as in transformers and torch
BLOCK_TOKENS = 512  # targets of one matmul for the head's gradient


def gather_targets(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a target, and the targets: ((T, H), (T,) int64 on hidden's device).

    hidden: (S, H) or (B, S, H); labels: (S,) or (B, S), IGNORED where there is no target. As in
    transformers, label i is predicted at position i - 1 and the first label of a sequence by nothing.
    Labels on the CPU avoid a wait for the device.
    """
    labels = labels.reshape(-1, labels.shape[-1])[:, 1:]
    hidden = hidden.reshape(len(labels), -1, hidden.shape[-1])[:, :-1]
    row, position = torch.nonzero(labels != IGNORED, as_tuple=True)
    targets = labels[row, position].to(device=hidden.device, dtype=torch.int64)
    return hidden[row.to(hidden.device), position.to(hidden.device)], targets


class SoftTargets(NamedTuple):
    """What the model shall say at each target: ids (T, K) int64, and their logprobs (T, K) fp32, in nats.

    -inf fills rows that have fewer; its id is then the row's first, and is not looked at. What a row's
    probabilities lack to 1 is one bucket: any other token. A row of one token with log-probability 0 is that
    token as a target (`teacher_of`). is_floor: (T,) bool, where the row's one token shall have at least its
    probability, and has no loss beyond; None: nowhere.
    """

    ids: Tensor
    logprobs: Tensor
    is_floor: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> SoftTargets:
        floor = None if self.is_floor is None else change(self.is_floor)
        return SoftTargets(change(self.ids), change(self.logprobs), floor)


def teacher_of(
    targets: Tensor,
    top_logprobs: Sequence[Sequence[tuple[int, float]] | None] | None,
    target_probability: float = 1.0,
) -> SoftTargets | None:
    """The teacher of `targets` (T,), on their device; None where no target has one.

    top_logprobs: for each target (token id, log-probability) pairs, ids distinct; None: the target itself,
    with target_probability as its floor.
    """
    if target_probability < 1 and top_logprobs is None:
        top_logprobs = [None] * len(targets)
    is_plain = top_logprobs is None or all(row is None for row in top_logprobs)
    if top_logprobs is None or (is_plain and target_probability == 1):
        return None
    assert len(top_logprobs) == len(targets), f"{len(top_logprobs)} teachers for {len(targets)} targets"
    rows = [
        [(token, math.log(target_probability))] if row is None else row
        for token, row in zip(targets.tolist(), top_logprobs, strict=True)
    ]
    width = max(map(len, rows))
    filled = [[*row, *[(row[0][0], -torch.inf)] * (width - len(row))] for row in rows]
    return SoftTargets(
        torch.tensor([[token for token, _ in row] for row in filled], device=targets.device),
        torch.tensor([[p for _, p in row] for row in filled], dtype=torch.float32, device=targets.device),
        None
        if target_probability == 1
        else torch.tensor([row is None for row in top_logprobs], device=targets.device),
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target), and d/dlogits of it, in the logits' memory: ((C,), (C, V)), fp32.

    logits: (C, V) fp32; targets: (C,). With p = softmax(z): df/dz_j = p_j - [j = target]
    (Goodfellow et al., Deep Learning, 6.2.2.3).
    """
    logsumexp = logits.logsumexp(dim=1, keepdim=True)
    values = logsumexp[:, 0] - _pick(logits, targets)
    dlogits = logits.sub_(logsumexp).exp_()
    return values, dlogits.scatter_add_(1, targets[:, None], torch.full_like(logsumexp, -1.0))


def distillation(logits: Tensor, teacher: SoftTargets) -> tuple[Tensor, Tensor]:
    """KL(teacher || model) over the teacher's tokens and one bucket for the rest, and d/dlogits of it, in the
    logits' memory: ((C,), (C, V)), fp32.

    logits: (C, V) fp32; teacher: rows of this chunk. With q and p the two distributions and r the bucket:

        f = sum_i q_i log(q_i / p_i) + q_r log(q_r / p_r),   p_r = sum of p_j over j that are no i
        df/dz_j = p_j - q_j for the teacher's tokens,  p_j (1 - q_r / p_r) for any other

    which is Hinton et al.'s distillation (arXiv:1503.02531, eq. 2) at temperature 1 on a coarser set of
    events. p_r is a sum of small terms, not 1 minus a sum, which fp32 would have cancelled. Where the teacher
    is a floor, f is 0 from p = q on.
    """
    ids, logq, is_floor = teacher
    is_given = logq > -torch.inf
    q = logq.exp()
    q_rest = (1 - q.sum(dim=1)).clamp_min(0.0)
    logsumexp = logits.logsumexp(dim=1, keepdim=True)
    logp = logits.gather(1, ids) - logsumexp
    p = logits.sub_(logsumexp).exp_().scatter_(1, ids, 0.0)
    p_rest = p.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    values = torch.where(is_given, q * (logq - logp), 0.0).sum(dim=1)
    values += torch.xlogy(q_rest, q_rest) - q_rest * p_rest.log()
    dlogits = p.mul_((1 - q_rest / p_rest)[:, None])
    # A fill is the row's first id once more, and writes the same value there.
    dlogits.scatter_(1, ids, logp.exp() - torch.where(is_given, q, q[:, :1]))
    if is_floor is not None:
        is_reached = is_floor & (dlogits.gather(1, ids[:, :1])[:, 0] >= 0)
        values, dlogits = values.masked_fill(is_reached, 0.0), dlogits.masked_fill_(is_reached[:, None], 0.0)
    return values, dlogits


def target_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    targets: Tensor,
    *,
    coefficients: Tensor | None = None,
    teacher: SoftTargets | None = None,
    policy: Policy | None = None,
    is_mean: bool = True,
    chunk_tokens: int = 64,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """The loss of the module's head over the targets: 0-dim fp32, differentiable once.

    hidden: (T, H) at the positions that predict `targets` (T,) int64; lm_head_weight: (V, H); bias: (V,).
    coefficients: (T,) fp32 of any sign, None for 1; teacher: None where every target is its token alone;
    policy: where a target has an advantage.
    Logits are rounded to the weight's dtype, as transformers and vLLM have them, then fp32 throughout.
    logit_scale: multiplies the logits (Cohere's logit_scale; Granite's is 1 / logits_scaling);
    softcap: then softcap * tanh(logits / softcap) (Gemma 2's final_logit_softcapping).
    """
    assert len(targets) > 0, "no targets"
    return _TargetLoss.apply(
        hidden, lm_head_weight, lm_head_bias, _Terms(targets, coefficients, teacher, policy, is_mean),
        chunk_tokens, softcap, logit_scale,
    )  # fmt: skip


def loss_of_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    coefficients: Tensor | None = None,
    teacher: SoftTargets | None = None,
    policy: Policy | None = None,
    is_mean: bool = True,
) -> Tensor:
    """The same of whole logits (T, V), for a head that is not linear: 0-dim fp32, differentiable."""
    return _LogitLoss.apply(logits, _Terms(targets, coefficients, teacher, policy, is_mean))


@torch.no_grad()
def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    targets: Tensor,
    *,
    chunk_tokens: int = 64,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """log p(target) of each target, (T,) fp32, without gradient; arguments as for `target_loss`."""
    logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = _logits(hidden[rows], lm_head_weight, lm_head_bias, softcap, logit_scale)
        logprobs[rows] = _pick(logits, targets[rows]) - logits.logsumexp(dim=1)
    return logprobs


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float | None
) -> Tensor:
    """(rows, V) fp32, a new tensor."""
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    if logit_scale is not None:
        logits.mul_(logit_scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None])[:, 0]


class _Terms(NamedTuple):
    """Of all targets; the fields as `target_loss` has them."""

    targets: Tensor
    coefficients: Tensor | None
    teacher: SoftTargets | None
    policy: Policy | None
    is_mean: bool

    def of(self, logits: Tensor, rows: slice, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(sum of a chunk's terms, scale * d/dlogits of it in the logits' memory); rows: the chunk's."""
        if self.teacher is None:
            terms, dlogits = cross_entropy(logits, self.targets[rows])
        else:
            terms, dlogits = distillation(logits, self.teacher.each(lambda part: part[rows]))
        factors = None
        if self.policy is not None:
            terms, slope = self.policy.term(-terms, rows)
            factors = -slope  # of cross entropy it is 1
        scale /= len(self.targets) if self.is_mean else 1
        terms = terms / (len(self.targets) if self.is_mean else 1)
        if self.coefficients is not None:
            terms = terms * self.coefficients[rows]
            factors = self.coefficients[rows] if factors is None else factors * self.coefficients[rows]
        if factors is not None:
            dlogits.mul_((factors * scale)[:, None])
        elif scale != 1:
            dlogits.mul_(scale)
        return terms.sum(), dlogits


class _HeadGradient:
    """dlogits^T h, the gradient of the head's weight (V, H), of a block of targets in one matmul.

    dlogits wait in the weight's dtype, as autograd hands them to that matmul, which sums in fp32 and rounds
    once. Sums over blocks are fp32. A block is no larger than the weight, and so never the largest tensor.
    """

    def __init__(self, weight: Tensor, num_targets: int, chunk_tokens: int):
        num_rows = min(BLOCK_TOKENS, weight.shape[1]) // chunk_tokens * chunk_tokens
        self._waiting = weight.new_empty(min(num_targets, max(chunk_tokens, num_rows)), weight.shape[0])
        self._num_waiting, self._num_left = 0, num_targets
        self.total: Tensor | None = None  # (V, H): the weight's dtype after one block, fp32 after several

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """dlogits: (C, V) fp32 of the next chunk; hidden: (all targets up to its last, H)."""
        self._waiting[self._num_waiting : self._num_waiting + len(dlogits)] = dlogits
        self._num_waiting += len(dlogits)
        self._num_left -= len(dlogits)
        if self._num_waiting < len(self._waiting) and self._num_left:
            return
        rows = self._waiting[: self._num_waiting]
        part = rows.T @ hidden[-self._num_waiting :].to(rows.dtype)
        self.total = part if self.total is None else self.total.float().add_(part)
        self._num_waiting = 0


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        terms: _Terms,
        chunk_tokens: int,
        softcap: float | None,
        logit_scale: float | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        new: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = _HeadGradient(weight, len(terms.targets), chunk_tokens) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], **new) if needs_bias else None
        total = torch.zeros((), **new)
        for start in range(0, len(terms.targets), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = _logits(hidden[rows], weight, bias, softcap, logit_scale)
            slope = None if softcap is None else 1 - (logits / softcap).square_()  # d cap*tanh(x/cap) / dx
            value, dlogits = terms.of(logits, rows, 1.0 if logit_scale is None else logit_scale)
            total += value
            if slope is not None:
                dlogits.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[rows] = dlogits.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight.add(dlogits, hidden[: rows.stop])
            if grad_bias is not None:
                grad_bias += dlogits.sum(dim=0)
        grads = (grad_hidden, grad_weight and grad_weight.total, grad_bias)
        ctx.grads = [
            None if grad is None or like is None else grad.to(like.dtype)
            for grad, like in zip(grads, (hidden, weight, bias), strict=True)
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Handed over, not kept: the head's gradient is the largest tensor of a training step.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("target_loss: backward was called a second time")
        return (*(None if g is None else g.mul_(grad_outputs[0]) for g in grads), *[None] * 4)


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, terms: _Terms) -> Tensor:
        whole = logits.float() if logits.dtype != torch.float32 else logits.clone()
        value, dlogits = terms.of(whole, slice(None))
        ctx.grad = dlogits.to(logits.dtype)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.grad * grad_outputs[0], None
