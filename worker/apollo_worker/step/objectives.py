"""Losses as one number for each target: d loss / d log p(target), computed from log-probabilities alone.

Whatever couples targets (a ratio, a pair, a batch) is in that number, so that each loss's backward pass is
that of a weighted cross entropy, d/dtheta (sum of slope_t * log p_t), one sequence after the other: no graph
of another sequence is held. Legend: T = targets, N = sequences, P = pairs; all tensors fp32, in nats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apollo_worker.jobs.objective import Objective


class Term(NamedTuple):
    """value: of the loss; slope: d value / d log p. Of targets (T,), or of sequences (N,) by the sum of their
    targets' log-probabilities."""

    value: Tensor
    slope: Tensor


def importance_sampling(logp: Tensor, sampled: Tensor, advantages: Tensor) -> Term:
    """-A r with r = p / p_sampled: REINFORCE (Williams 1992) on tokens of another policy."""
    value = -advantages * (logp - sampled).exp()
    return Term(value, value)


def ppo(logp: Tensor, sampled: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Term:
    """-min(r A, clip(r, 1 - below, 1 + above) A) (arXiv:1707.06347, eq. 7; two bounds: DAPO,
    arXiv:2503.14476, eq. 10). No slope where the clipped one is smaller: it does not depend on p."""
    ratio = (logp - sampled).exp()
    value = -ratio * advantages
    clipped = -ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages
    return Term(torch.maximum(value, clipped), torch.where(value >= clipped, value, 0.0))


def cispo(logp: Tensor, sampled: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Term:
    """-sg(clip(r)) A log p: the weight is clipped, no token loses its gradient (MiniMax-M1, arXiv:2506.13585,
    eq. 4)."""
    slope = -(logp - sampled).exp().clamp(1 - clip[0], 1 + clip[1]) * advantages
    return Term(slope * logp, slope)


def dro(logp: Tensor, sampled: Tensor, advantages: Tensor, beta: float) -> Term:
    """-A log p + beta / 2 (log r)^2: what of DRO's square (arXiv:2405.19107) depends on p, over beta, with
    the reward less the value as the advantage."""
    moved = logp - sampled
    return Term(-advantages * logp + beta / 2 * moved.square(), -advantages + beta * moved)


def kl_to_reference(logp: Tensor, reference: Tensor) -> Term:
    """p_ref / p - log(p_ref / p) - 1, which estimates KL(p || p_ref) on tokens of p and is never negative
    (GRPO, arXiv:2402.03300, eq. 4)."""
    away = reference - logp
    return Term(away.expm1() - away, -away.expm1())


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Term:
    """-log sigmoid(m), m = beta (chosen - rejected) (arXiv:2305.18290, eq. 7), of pairs (P,).

    chosen, rejected: (P,) log p - log p_ref of a whole answer. The slope is that of the chosen, -beta
    sigmoid(-m); of the rejected it is the opposite.
    """
    margin = beta * (chosen - rejected)
    return Term(-torch.nn.functional.logsigmoid(margin), -beta * torch.sigmoid(-margin))


def kto(moved: Tensor, is_good: Tensor, unlike: Tensor, beta: float) -> Term:
    """1 - sigmoid(beta (d - z)) of a good answer, 1 - sigmoid(beta (z - d)) of a bad one (arXiv:2402.01306,
    eq. 8, both weights 1).

    moved: (N,) d = log p - log p_ref of a whole answer; is_good: (N,) bool; unlike: d of answers to other
    contexts, whose mean, at least 0, is z, which has no gradient (section 4.1); none: z = 0.
    """
    point = unlike.mean().clamp_min(0.0) if len(unlike) else 0.0
    sign = is_good.to(moved.dtype) * 2 - 1
    kept = torch.sigmoid(sign * beta * (moved - point))
    return Term(1 - kept, -sign * beta * kept * (1 - kept))


class Policy(NamedTuple):
    """What a ratio's loss knows of its targets. sampled (T,): log p of who sampled them, None: of the model
    as it is now; advantages (T,); reference (T,), where the divergence from it counts."""

    objective: Objective
    sampled: Tensor | None
    advantages: Tensor
    reference: Tensor | None

    def term(self, logp: Tensor, rows: slice) -> Term:
        """Of the targets `rows`, whose log-probabilities now are `logp`."""
        sampled = logp if self.sampled is None else self.sampled[rows]
        advantages, clip = self.advantages[rows], self.objective.clip
        match self.objective.loss:
            case "importance_sampling":
                term = importance_sampling(logp, sampled, advantages)
            case "ppo" | "grpo":
                term = ppo(logp, sampled, advantages, clip)
            case "cispo":
                term = cispo(logp, sampled, advantages, clip)
            case other:
                assert other == "dro", other
                term = dro(logp, sampled, advantages, self.objective.beta)
        if self.reference is None:
            return term
        away, weight = kl_to_reference(logp, self.reference[rows]), self.objective.kl_to_reference
        return Term(term.value + weight * away.value, term.slope + weight * away.slope)
