"""Says which example of a job the model still does not say, once its last step is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from apollo_worker.jobs.job_plan import JobPlan

if TYPE_CHECKING:
    from apollo_worker.step.step import Trainer

HIGH = 1.0  # nats a token: the demonstration knows 1 of its 5 facts at 1.5, all of them at 0.04
MEASURED = 3  # updates at most: each costs a forward pass


def high_loss_notes(trainer: Trainer, plan: JobPlan, last_losses: Mapping[int, float]) -> list[str]:
    """At most one note. last_losses: of updates of an epoch (from 0), as the last pass saw them, which is
    before it trained them: those above HIGH are measured again, the highest first."""
    is_plain = plan.is_plain and not any(one.top_logprobs for one in plan.examples)
    high = sorted((at for at, loss in last_losses.items() if loss > HIGH), key=last_losses.__getitem__)
    if not is_plain or not high:
        return []
    now = {at: trainer.mean_loss(plan.examples_of(at)) for at in high[-MEASURED:]}
    worst = max(now, key=now.__getitem__)
    if not now[worst] > HIGH:
        return []
    numbers = sorted({one.example for one in plan.examples_of(worst)})
    which = f"example {numbers[0]}" if len(numbers) == 1 else f"examples {numbers[0]} to {numbers[-1]}"
    return [f"the loss of {which} is still {now[worst]:.2g}: raise epochs or lr"]
