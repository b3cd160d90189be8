"""A test of the simulator, and of the flushes: without any one of them some power cut does harm that is found.

The real effect of a program without that flush is the same, so it is taken out of the recorded log only.
"""

from __future__ import annotations

import random

import pytest
from explorer import Explorer
from scenarios import SCENARIOS, Recorded, Scenario, record, record_killed
from simulated_disk import FLUSHES, Operation

SEED = 2014
# Flushes that an undisturbed run cannot show to be needed: they are for a record that another process has left
# without flushing it, because it was killed. (function that flushes, file or directory)
FOR_THE_KILLED = {("recover > _flush_record", ".apollo"), ("_recover", ".apollo")}


def flushes(recorded: Recorded) -> list[int]:
    """Where in the log the package flushes."""
    return [n for n, op in enumerate(recorded.log) if op.kind in FLUSHES and op.site and n >= recorded.start]


def harm_without(explorer: Explorer, recorded: Recorded, flush: int) -> str | None:
    log = recorded.log[:flush] + recorded.log[flush + 1 :]
    # Few states of each moment first: most harm is done by the extremes.
    for limit in (12, 60, 240):
        if harm := next(explorer.problems(recorded, log=log, start=flush, limit=limit), None):
            return harm
    return None


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: f"{one.protocol}, {one.name}")
def test_each_flush_of_a_protocol_is_missed_when_it_is_left_out(scenario, work_dir):
    recorded = record(scenario, work_dir)
    explorer = Explorer(work_dir, scenario.truth, random.Random(SEED))
    for flush in flushes(recorded):
        op = recorded.log[flush]
        harm = harm_without(explorer, recorded, flush)
        print(f"{flush} {op} {op.site}: {harm}")
