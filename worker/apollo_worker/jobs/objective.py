"""What a job's steps minimise: the loss's name and its numbers, decided at submit and stored with the plan.

The formulas: apollo_worker.step.objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from apollo_ipc.wire.losses import LossName
from apollo_ipc.wire.requests import TrainOptions

BETA = {"dro": 0.05}  # 0.1 of the others, as their papers have it
COUPLED = ("dpo", "kto")  # one term has several sequences
BY_EXAMPLE = (*COUPLED, "grpo")  # all sequences of an example are trained in one update


class Objective(msgspec.Struct, frozen=True, omit_defaults=True):
    """beta: of dpo, kto and dro; clip: how far a ratio may be below and above 1; kl_to_reference: weight of
    the divergence from the weights before the job; is_to_reference: of grpo, those weights stand for the
    sampler of answers that came without its log-probabilities; target_probability: of cross_entropy, from
    where on a target has no loss. Stored: new fields go last."""

    loss: LossName = "cross_entropy"
    beta: float = 0.1
    clip: tuple[float, float] = (0.2, 0.2)
    kl_to_reference: float = 0.0
    is_to_reference: bool = False
    target_probability: float = 1.0

    @property
    def needs_reference(self) -> bool:
        """Log-probabilities by the weights before the job's first step."""
        return self.loss in COUPLED or self.kl_to_reference > 0 or self.is_to_reference


def make_objective(loss: LossName, options: TrainOptions, *, is_to_reference: bool) -> Objective:
    clip = options.clip if options.clip is not None else 0.2
    return Objective(
        loss,
        options.beta or BETA.get(loss, 0.1),
        (clip[0], clip[1]) if isinstance(clip, list) else (clip, clip),
        options.kl_to_reference or 0.0,
        is_to_reference and loss == "grpo",
        1.0 if options.target_probability is None else options.target_probability,
    )


def advantages_of(rewards: Sequence[float]) -> list[float]:
    """A_i = r_i - mean(r), for the answers of one group; all exactly 0 where all rewards are equal.

    Without GRPO's division by the standard deviation (arXiv:2402.03300, section 4.1.2), which weighs groups
    up that are nearly all right or nearly all wrong (Dr. GRPO, arXiv:2503.20783, section 3.1). Whoever wants
    it divides the rewards: their mean does not matter, and of their size Adam keeps little.
    """
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]
