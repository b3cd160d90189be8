"""A test of the simulator, and of the flushes: without any one of them a power cut does harm, which is found.

A flush has no other effect than on what a power cut may leave: it is taken out of the recorded log.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from explorer import Explorer
from scenarios import RECOVERIES, SCENARIOS, Recorded, Scenario, record
from simulated_disk import FLUSHES, Operation

SEED = 2014
# Needed only where an earlier process was killed between the rename of its record and the flush.
AFTER_A_KILL = {"repair: .apollo", "_flush_record: .apollo"}
# Needed only where someone has put the shards there without flushing them.
AFTER_A_DOWNLOAD = {"_flush_foreign: model"}
# A restore folds first, and that the commit after it flushes. That a fold does: seen in the fold alone.
BEFORE_A_COMMIT = {"restore": {"publish < fold: .apollo"}}


def flushes(recorded: Recorded) -> list[tuple[int, Operation]]:
    """Those of the package in the log (of a killed run: of its recovery), with their numbers."""
    return [
        (n, op) for n, op in enumerate(recorded.log) if op.kind in FLUSHES and op.site and n >= recorded.start
    ]


def harm_without(explorer: Explorer, recorded: Recorded, flush: int, limits=(12, 60, 240)) -> str | None:
    """Of few states of each moment first: most harm is seen in the extremes."""
    log = recorded.log[:flush] + recorded.log[flush + 1 :]
    for limit in limits:
        if harm := next(explorer.problems(recorded, log=log, start=flush, limit=limit), None):
            return harm
    return None


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: f"{one.protocol}, {one.name}")
def test_each_flush_of_a_protocol_is_missed_when_it_is_left_out(scenario, work_dir):
    recorded = record(scenario, work_dir)
    explorer = Explorer(work_dir, scenario.truth, random.Random(SEED))
    elsewhere = AFTER_A_KILL | AFTER_A_DOWNLOAD | BEFORE_A_COMMIT.get(scenario.protocol, set())
    here = [(n, op) for n, op in flushes(recorded) if op.site not in elsewhere]
    if scenario.is_downloaded:
        here = [(n, op) for n, op in flushes(recorded) if op.site in AFTER_A_DOWNLOAD]
    assert here
    not_missed = [f"{op} in {op.site}" for n, op in here if not harm_without(explorer, recorded, n)]
    assert not_missed == []


def killed_between_record_and_flush(scenario: Scenario, work_dir: Path) -> list[Recorded]:
    undisturbed = record(scenario, work_dir).log
    last = max(n for n, op in enumerate(undisturbed) if op.path == ".apollo/commit.json")
    return [record(scenario, work_dir, kill_before=last + 1, then=then) for then in RECOVERIES]


def test_each_flush_of_a_recovery_is_missed_when_it_is_left_out(work_dir):
    seen, missed = set(), set()
    for scenario in SCENARIOS:
        if not scenario.is_killed:
            continue
        explorer = Explorer(work_dir, scenario.truth, random.Random(SEED))
        for recorded in killed_between_record_and_flush(scenario, work_dir):
            for flush, op in flushes(recorded):
                seen.add(op.site)
                if op.site not in missed and harm_without(explorer, recorded, flush, limits=(40,)):
                    missed.add(op.site)
    assert seen - missed == set()
    assert missed >= AFTER_A_KILL | {"publish < repair: commit.json.new", "publish < repair: .apollo"}


@pytest.mark.parametrize("scenario", SCENARIOS[:5], ids=lambda one: f"{one.protocol}, {one.name}")
def test_a_record_that_is_renamed_before_its_data_is_flushed_is_found(scenario, work_dir):
    recorded = record(scenario, work_dir)
    explorer = Explorer(work_dir, scenario.truth, random.Random(SEED))
    renamed = next(n for n, op in enumerate(recorded.log) if op.path == ".apollo/commit.json")
    early = [
        n
        for n, op in enumerate(recorded.log[:renamed])
        if op.kind == "sync" and op.path.startswith(".apollo")
    ]
    assert len(early) == 4, "two shards, optimizer state, record"
    for flush in early:
        log = list(recorded.log)
        log.insert(renamed, log.pop(flush))
        assert next(explorer.problems(recorded, log=log, limit=12), None), recorded.log[flush]
