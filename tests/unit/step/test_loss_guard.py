"""Which losses end a job, and which do not. What they are compared with is from before the job."""

from __future__ import annotations

import math

import pytest
from apollo_worker.step.loss_guard import LOOK_EVERY_STEPS, Before, LossGuard

from apollo_ipc.errors import UserError

GUESS = math.log(49152)  # 10.8: SmolLM2's vocabulary


def run(losses, *, ratio=5.0, history=(), text=None, texts=(), firsts=(), guess=2.5, **known) -> tuple:
    """(steps done before the guard ends the job, why, how often the text was measured).

    text: its loss before the job; texts: after step 1, 2, ..., the last of them ever after; firsts: of the
    job's first step, measured again, likewise.
    """
    step, looks = 0, []

    def at(values):
        looks.append(step)
        return values[min(step, len(values)) - 1]

    guard = LossGuard(
        3, ratio, Before(history, text, guess),
        measure_text=lambda: at(texts), measure_first=lambda: at(firsts or [0.0]), **known,
    )  # fmt: skip
    try:
        for step, loss in enumerate(losses, 1):
            guard.look(step, loss, is_written=math.isfinite(loss))
        guard.check()
    except UserError as error:
        return step, error.code, looks
    return step, None, looks


# --- models that know the text ---


def test_one_step_that_ruins_the_model_ends_a_job_of_one_step():
    """lr 0.1 on SmolLM2-135M: the text goes from 2.9 to 84 nats (docs/log.md)."""
    assert run([4.98], text=2.9, texts=[84.0], guess=GUESS) == (1, "loss_spike", [1])


def test_harm_is_seen_where_the_losses_of_the_job_itself_only_fall():
    """lr 1e-3: its own example gets better, and everything else is forgotten."""
    assert run([4.98, 3.77], text=2.9, texts=[9.3], guess=GUESS)[:2] == (1, "loss_spike")


@pytest.mark.parametrize("now", [math.nan, math.inf])
def test_a_text_whose_loss_is_no_number_is_harm(now):
    assert run([5.0], text=2.9, texts=[now], guess=GUESS)[:2] == (1, "loss_spike")


def test_hard_examples_are_no_harm_while_the_text_is_known():
    losses = [0.5, *[2.0] * 20, *[14.0] * 12, *[0.1] * 20, *[30.0] * 5]
    steps, why, looks = run(losses, history=[2.0] * 64, text=2.9, texts=[3.2], guess=GUESS)
    assert (steps, why) == (len(losses), None)
    assert len(looks) == len({1, 2, 4, 8, 16, 32, len(losses)} | {*range(22, 34)} | {*range(54, 59)})


def test_the_text_is_looked_at_ever_more_rarely_and_at_the_end():
    looks = run([2.0] * 100, text=2.9, texts=[2.9], guess=GUESS)[2]
    assert looks == [1, 2, 4, 8, 16, 32, 64, 96, 100]
    assert LOOK_EVERY_STEPS == 32


def test_harm_between_two_looks_is_seen_by_the_jobs_own_losses_at_once():
    texts = [2.9] * 40 + [30.0]
    assert run([2.0] * 40 + [42.0] * 60, text=2.9, texts=texts, guess=GUESS)[:2] == (41, "loss_spike")


def test_a_job_that_is_resumed_is_compared_with_what_was_before_its_first_step():
    """The process that was to look after the last step was killed."""
    known = {"text": 2.9, "texts": [84.0], "guess": GUESS, "first_loss": 4.98}
    assert run([], **known)[1] == "loss_spike"


def test_nothing_is_measured_where_the_guard_is_off():
    assert run([1e6] * 50, ratio=0.0, text=2.9, texts=[84.0], guess=GUESS) == (50, None, [])


# --- models that do not ---


def test_steps_that_are_not_finite_end_the_job_only_in_a_row():
    steps, why, _ = run([1.0, math.nan, math.nan, 1.0, math.nan, math.nan, math.inf, 1.0])
    assert (steps, why) == (7, "not_finite")


def test_losses_far_above_the_usual_end_the_job_only_in_a_row():
    usual = [2.0] * 8
    assert run([*usual, 11.0, 11.0, 2.0, 11.0, 11.0, 11.0, 2.0])[:2] == (14, "loss_spike")
    assert run([*usual, *[9.9] * 20])[:2] == (28, None)


def test_a_job_that_harms_from_its_first_step_is_not_what_it_is_measured_by():
    """Fault 28: losses 10, 9, 101, 42, 139 were all among the first eight, and so were usual."""
    assert run([10.0, 9.0, 101.0, 142.0, 139.0, 50.0], firsts=[9.0])[:2] == (5, "loss_spike")


def test_the_first_step_measured_again_ends_a_job_of_few_steps():
    assert run([5.0, 9.0], firsts=[9.0, 26.0])[:2] == (2, "loss_spike")
    assert run([5.0, 9.0], firsts=[9.0, 24.0])[:2] == (2, None)


def test_what_jobs_before_began_with_is_usual():
    """A first example that is known by heart, then unlike ones, as in the jobs before."""
    losses = [0.01, *[12.0] * 9]
    assert run(losses)[:2] == (4, "loss_spike")
    assert run(losses, history=[3.0] * 5)[:2] == (10, None)


def test_new_facts_after_learnt_ones_are_no_spike():
    """A job that has memorised its first examples meets unlike ones: below 5 nats nothing is a spike."""
    assert run([3.0, 1.0, 0.3, *[0.01] * 100, *[4.9] * 50])[:2] == (153, None)


def test_up_to_twice_a_guess_nothing_is_a_spike():
    """A random model that has learnt one text by heart is more wrong about others than a guess."""
    assert run([0.1, *[11.0] * 50], guess=5.8)[:2] == (51, None)
    assert run([0.1, *[12.0] * 50], guess=5.8)[:2] == (4, "loss_spike")


def test_a_random_model_may_have_any_loss_that_it_began_with():
    assert run([11.0] * 8 + [0.1] * 200 + [11.0] * 50)[:2] == (258, None)


@pytest.mark.parametrize("slope", [1.01, 1.05])
def test_a_slow_rise_raises_the_limit_with_it(slope):
    assert run([slope**i for i in range(150)])[:2] == (150, None)


def test_what_runs_away_is_not_taken_for_usual():
    losses = [2.0] * 20 + [10.1, 10.1, 2.0] * 100
    assert run(losses)[:2] == (len(losses), None)
    assert run([*losses, 10.1, 10.1, 10.1])[:2] == (len(losses) + 3, "loss_spike")
