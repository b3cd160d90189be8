"""The learning rate over a job's steps."""

import itertools
import math

import pytest
from apollo_worker.jobs.job_plan import JobPlan, resolve_schedule


def rates(num_steps, schedule="cosine", peak=2.0, warmup_fraction=0.1):
    plan = JobPlan([], [], 0, num_steps, peak, 0.0, schedule, warmup_fraction)
    return [plan.learning_rate(step) for step in range(num_steps)]


def test_constant_is_the_peak_at_every_step():
    assert rates(7, "constant") == [2.0] * 7


def test_warm_up_rises_evenly_to_the_peak_and_the_cosine_starts_there():
    got = rates(30)
    assert got[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])  # ceil(0.1 * 30) is 3, not 4
    assert got.index(max(got)) == 2


def test_the_cosine_falls_through_half_the_peak_in_its_middle_and_wastes_no_step():
    got = rates(110)  # 11 warm-up, 99 of cosine
    falling = got[11:]
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert got[11 + 33] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 3)))
    # The value one step before the cosine's zero: about peak * (pi / 2 / 99)^2.
    assert 0 < got[-1] == pytest.approx(2.0 * (math.pi / 2 / 99) ** 2, rel=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1, 0.5, 1.0])
def test_every_step_of_every_length_has_a_rate_above_zero_and_at_most_the_peak(num_steps, warmup_fraction):
    got = rates(num_steps, warmup_fraction=warmup_fraction)
    assert all(0 < rate <= 2.0 for rate in got)
    assert max(got) == 2.0


def test_auto_is_constant_for_one_example_and_cosine_for_more():
    assert resolve_schedule("auto", 1) == "constant"
    assert resolve_schedule("auto", 2) == "cosine"
    assert resolve_schedule("cosine", 1) == "cosine"
    assert resolve_schedule("constant", 5) == "constant"
