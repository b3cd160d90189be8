"""Which losses end a job, and which do not."""

from __future__ import annotations

import math

import pytest
from apollo_worker.step.loss_guard import OPENING_STEPS, LossGuard

from apollo_ipc.errors import UserError


def look(losses, ratio: float = 5.0, max_bad_steps: int = 3) -> int:
    """How many steps are done before the guard ends the job."""
    guard = LossGuard(max_bad_steps, ratio)
    for step, loss in enumerate(losses):
        try:
            guard.look(loss, is_written=math.isfinite(loss))
        except UserError as error:
            look.code = error.code
            return step + 1
    return len(losses)


def test_steps_that_are_not_finite_end_the_job_only_in_a_row():
    assert look([1.0, math.nan, math.nan, 1.0, math.nan, math.nan, math.inf, 1.0]) == 7
    assert look.code == "not_finite"


def test_losses_far_above_the_usual_end_the_job_only_in_a_row():
    usual = [2.0] * OPENING_STEPS
    assert look([*usual, 11.0, 11.0, 2.0, 11.0, 11.0, 11.0, 2.0]) == OPENING_STEPS + 6
    assert look.code == "loss_spike"
    assert look([*usual, *[9.9] * 20]) == OPENING_STEPS + 20


def test_new_facts_after_learnt_ones_are_no_spike():
    """A job that has memorised its first examples meets unlike ones: below 5 nats nothing is a spike."""
    assert look([3.0, 1.0, 0.3, *[0.01] * 100, *[4.9] * 50]) == 153


def test_a_random_model_may_have_any_loss_that_it_began_with():
    assert look([11.0] * 8 + [0.1] * 200 + [11.0] * 50) == 258


def test_no_spike_is_called_in_the_first_steps_or_with_ratio_0():
    assert look([0.1, *[1000.0] * (OPENING_STEPS - 1)]) == OPENING_STEPS
    assert look([1.0] * 50 + [1e6] * 50, ratio=0.0) == 100


@pytest.mark.parametrize("slope", [1.01, 1.05])
def test_a_slow_rise_raises_the_limit_with_it(slope):
    assert look([slope**i for i in range(150)]) == 150


def test_what_runs_away_is_not_taken_for_usual():
    losses = [2.0] * 20 + [10.1, 10.1, 2.0] * 100
    assert look(losses) == len(losses)
    assert look([*losses, 10.1, 10.1, 10.1]) == len(losses) + 3
