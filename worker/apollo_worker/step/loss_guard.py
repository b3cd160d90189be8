"""Stops a job whose steps harm the live weights. Its references are from before the job's first step."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from apollo_ipc.errors import UserError
from apollo_worker.jobs.example import Turn, sequence_of
from apollo_worker.jobs.job_plan import JobPlan

if TYPE_CHECKING:
    from apollo_worker.step.step import Trainer

WINDOW_STEPS = 64
FLOOR = 1.0  # nats a token: below it a loss is low, however much higher than the others
KNOWS = 4.0  # nats a token below a guess among all tokens: then a model knows the text
MAY_FORGET = 0.25  # of those nats; what is ordinary takes none (docs/log.md, 2026-11-27)
LOOK_EVERY_STEPS = 32


class Before(NamedTuple):
    """What was seen before the job's first step, on weights that it had not touched yet.

    first_losses: of jobs before, each as its first step saw it; text: mean loss of the text that the guard
    measures, None where there is none; guess: of a model that knows nothing, ln of the vocabulary's size.
    Nats a token.
    """

    first_losses: Sequence[float]
    text: float | None
    guess: float


class LossGuard:
    """One job's. max_bad_steps: so many bad steps in a row end it; spike_ratio: 0 calls nothing a harm.

    A step of which nothing could be written (not finite) is bad. Whether those that were written do harm, a
    text says that is not trained: the job ends where a quarter of what the model knew of it is lost (a loss
    so far up to a guess). It is measured (measure_text) after the first steps, then ever more rarely,
    whenever a loss is far above what was usual before, and before the weights are kept (`check`).

    A model that does not know the text is looked at with the job's own losses. The job's first step, measured
    again (measure_first), may not be spike_ratio times above what it was; and a step is bad above spike_ratio
    times the largest of: the median of jobs' first losses before, the job's own first loss, the median of the
    last WINDOW_STEPS, FLOOR; at least twice a guess.
    """

    def __init__(
        self,
        max_bad_steps: int,
        spike_ratio: float,
        before: Before,
        *,
        measure_text: Callable[[], float],
        measure_first: Callable[[], float],
        first_loss: float | None = None,
        are_plain: bool = True,
    ):
        """first_loss: of the job's first step, where that is done already (a job that is resumed); are_plain:
        the job's losses are nats a token, so that they can be compared with others."""
        self._max_bad_steps, self._spike_ratio, self.before = max_bad_steps, spike_ratio, before
        self._measure_text, self._measure_first = measure_text, measure_first
        self._first_loss, self._are_plain = first_loss, are_plain
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._num_not_finite = self._num_spikes = 0
        # Steps since the last look; those of the process before may be some too.
        self._num_unchecked = int(first_loss is not None)

    @property
    def knows_text(self) -> bool:
        """Whether the model did before the job."""
        return self.before.guess - (math.inf if self.before.text is None else self.before.text) >= KNOWS

    def look(self, step: int, loss: float, *, is_written: bool) -> None:
        """After each step (from 1). Raises UserError (`not_finite` or `loss_spike`), with the numbers."""
        self._num_not_finite = 0 if is_written else self._num_not_finite + 1
        if self._num_not_finite >= self._max_bad_steps:
            raise UserError(
                f"{self._num_not_finite} steps in a row gave a loss or gradient that is not finite (last "
                f"loss {loss}); nothing of them was written. A smaller lr may help",
                code="not_finite",
            )
        if not is_written:
            return
        self._num_unchecked += 1
        limit = self.limit()
        is_spike = limit is not None and not loss <= limit
        if self._first_loss is None:
            self._first_loss = loss
        self._num_spikes = self._num_spikes + 1 if is_spike else 0
        if not is_spike:  # what is above the limit does not raise it
            self._recent.append(loss)
        if step & (step - 1) == 0 or step % LOOK_EVERY_STEPS == 0 or (is_spike and self.knows_text):
            self.check()
        if self._num_spikes >= self._max_bad_steps and not self.knows_text:
            usual = statistics.median(self._recent or [math.nan])
            raise _harm(
                f"{self._num_spikes} steps in a row had a loss above {limit:.3g} (last loss {loss:.3g}, "
                f"median of the last {len(self._recent)} steps {usual:.3g})"
            )

    def check(self) -> None:
        """Before the weights are kept: the job's end, a sync. Raises UserError (code `loss_spike`)."""
        if not self._spike_ratio or not self._num_unchecked:
            return
        self._num_unchecked = 0
        if self.before.text is not None and self.knows_text:
            was, now, what = self.before.text, self._measure_text(), "a text that the model knew"
            limit = was + MAY_FORGET * (self.before.guess - was)
        elif self._first_loss is not None and self._are_plain:
            was, now, what = self._first_loss, self._measure_first(), "the job's first step"
            limit = self._at_least_a_guess(was)
        else:
            return
        if not now <= limit:  # NaN too
            raise _harm(f"the loss of {what} went from {was:.3g} to {now:.3g}, above {limit:.3g}")

    def limit(self) -> float | None:
        """Above which a loss is a spike now; None while nothing was seen."""
        seen = [statistics.median(some) for some in (self.before.first_losses, self._recent) if some]
        seen += [] if self._first_loss is None else [self._first_loss]
        is_any = seen and self._spike_ratio and self._are_plain
        return self._at_least_a_guess(*seen) if is_any else None

    def _at_least_a_guess(self, *usual: float) -> float:
        limit = self._spike_ratio * max(*usual, FLOOR)
        # One who knows nothing but the last job's text is as wrong as a guess about all others, and more so.
        return limit if self.knows_text else max(limit, 2 * self.before.guess)


def guard_of(
    trainer: Trainer,
    plan: JobPlan,
    *,
    first_losses: Sequence[float] = (),
    text_loss: float | None = None,
    first_loss: float | None = None,
) -> LossGuard:
    """The guard of a job of this plan. text_loss, first_loss: as they were before the job began, where that
    is a while ago (it is resumed); the text is measured now where it was not then."""
    options = trainer.options
    text = [sequence_of(plan.known_text, [Turn(0, len(plan.known_text))])] if plan.known_text else []
    if text and text_loss is None and options.spike_ratio:
        text_loss = trainer.mean_loss(text)
    return LossGuard(
        options.max_bad_steps,
        options.spike_ratio,
        Before(first_losses, text_loss, math.log(trainer.vocab_size)),
        measure_text=lambda: trainer.mean_loss(text),
        measure_first=lambda: trainer.mean_loss(plan.examples_of(0)),
        first_loss=first_loss,
        are_plain=plan.is_plain,
    )


def _harm(what: str) -> UserError:
    return UserError(
        f"{what}: the job harms the model. A smaller lr may help; train.spike_ratio = 0 looks at no loss",
        code="loss_spike",
    )
