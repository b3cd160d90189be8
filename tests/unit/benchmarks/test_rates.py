"""benchmarks/rates.py: what it trains as a night, and how a run is written."""

import argparse

import pytest
from places import BENCHMARKS


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_night_is_five_hundred_different_questions_the_same_for_a_seed_and_none_that_is_asked_afterwards():
    from rates_night import night  # pyright: ignore[reportMissingImports]

    pairs, facts = night(500, 0)
    assert (len(dict(pairs)), len(facts)) == (500, 250)
    assert (pairs, facts) == night(500, 0)
    assert pairs != night(500, 1)[0]
    asked = {one.text for fact in facts for one in fact.paraphrased}
    assert len(asked) == len(facts)
    assert not asked & dict(pairs).keys()
    assert all(fact.taught.key in fact.answer for fact in facts)


def test_a_run_is_a_job_its_options_and_those_of_the_configuration():
    from rates import run_of  # pyright: ignore[reportMissingImports]

    run = run_of("five:lr=1e-4,epochs=4,limiter_ratio=0")
    assert (run.job, run.options.lr, run.options.epochs) == ("five", 1e-4, 4)
    assert run.train == {"limiter_ratio": 0.0}
    with pytest.raises(argparse.ArgumentTypeError, match="'six' is none of five, night"):
        run_of("six:lr=1e-4")
