"""Stops a job whose steps harm the live weights: losses that are not finite, or far above what they were."""

from __future__ import annotations

import statistics
from collections import deque

from apollo_ipc.errors import UserError

WINDOW_STEPS = 64
OPENING_STEPS = 8  # a job's first losses, of what was not learnt yet; no spike is called before them
FLOOR = 1.0  # nats a token: below it a loss is low, however much higher than the others


class LossGuard:
    """One job's. max_bad_steps: so many bad steps in a row end it; spike_ratio: 0 calls no loss a spike.

    A step is bad where nothing of it could be written (not finite), or where its loss is above spike_ratio
    times the largest of: the median of the last WINDOW_STEPS losses, that of the job's first ones, FLOOR.
    """

    def __init__(self, max_bad_steps: int, spike_ratio: float):
        self._max_bad_steps, self._spike_ratio = max_bad_steps, spike_ratio
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._opening: list[float] = []
        self._num_not_finite = self._num_spikes = 0

    def look(self, loss: float, *, is_written: bool) -> None:
        """After each step. Raises UserError (code `not_finite` or `loss_spike`), with the numbers."""
        self._num_not_finite = 0 if is_written else self._num_not_finite + 1
        if self._num_not_finite >= self._max_bad_steps:
            raise UserError(
                f"{self._num_not_finite} steps in a row gave a loss or gradient that is not finite (last "
                f"loss {loss}); nothing of them was written. A smaller lr may help",
                code="not_finite",
            )
        if not is_written:
            return
        limit = self.limit()
        self._num_spikes = self._num_spikes + 1 if limit is not None and loss > limit else 0
        if self._num_spikes >= self._max_bad_steps:
            raise UserError(
                f"{self._num_spikes} steps in a row had a loss above {limit:.3g} (last loss {loss:.3g}, "
                f"median of the last {len(self._recent)} steps {statistics.median(self._recent):.3g}): the "
                "job harms the model. A smaller lr may help; train.spike_ratio sets the limit, 0: none",
                code="loss_spike",
            )
        if not self._num_spikes:  # what is above the limit does not raise it
            self._recent.append(loss)
        if len(self._opening) < OPENING_STEPS:
            self._opening.append(loss)

    def limit(self) -> float | None:
        """Above which a loss is a spike now; None while too little was seen."""
        if not self._spike_ratio or len(self._opening) < OPENING_STEPS or not self._recent:
            return None
        usual = max(statistics.median(self._recent), statistics.median(self._opening), FLOOR)
        return self._spike_ratio * usual
