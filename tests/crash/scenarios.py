"""Each protocol of a checkpoint as a short program on a simulated disk, and what may be left at each moment."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from platter import Platter, State, read_state
from simulated_disk import Killed, Operation, SimulatedDisk
from small_model import Known, Outcome, known, make_model, sync

from apollo_ipc.checkpoint import begin, compact, forget, loading, recover, restore_version, snapshot

UNSYNCED = Outcome(None, (), 0)


class Scenario(NamedTuple):
    """`prepare` is done on a disk that loses nothing; `run` is what the power is cut in.

    before, after: the outcomes that are right until `run` has returned, and from then on `after` alone.
    """

    name: str
    prepare: Callable[[Path], object]
    run: Callable[[Path, SimulatedDisk], object]
    before: Outcome
    after: Outcome
    truth: dict[int, Known]


class Recorded(NamedTuple):
    scenario: str
    initial: State
    log: list[Operation]
    truth: dict[int, Known]


def record(scenario: Scenario, work_dir: Path, *, kill_before: int | None = None, then: str = "") -> Recorded:
    """The log of one run; with `kill_before`, of one that is killed there, and of `then`, done by another
    process afterwards: "recover", "begin", "load". What that has left must not go away again."""
    model_dir = make_model(work_dir / "recorded")
    scenario.prepare(model_dir)
    initial = read_state(model_dir)
    disk = SimulatedDisk(model_dir)
    disk.allow(scenario.before, scenario.after)
    if kill_before is None:
        scenario.run(model_dir, disk)
        disk.allow(scenario.after)
    else:
        disk.kill_before(kill_before)
        try:
            scenario.run(model_dir, disk)
        except Killed:
            pass
        else:
            disk.allow(scenario.after)
        disk.revive()
        RECOVERIES[then](model_dir, disk)
        disk.allow(left(model_dir, scenario))
    shutil.rmtree(model_dir)
    return Recorded(scenario.name, initial, disk.log, scenario.truth)


def left(model_dir: Path, scenario: Scenario) -> Outcome:
    from apollo_ipc.checkpoint import read_commit

    commit = read_commit(model_dir)
    found = None if commit is None else commit.weight_version
    if scenario.before == scenario.after or found == scenario.after.version:
        return scenario.after
    assert found == scenario.before.version
    return scenario.before


def _begin(model_dir: Path, disk: SimulatedDisk) -> None:
    with begin(model_dir, disk=disk, lock_wait_s=0.0):
        pass


def _load(model_dir: Path, disk: SimulatedDisk) -> None:
    with loading(model_dir, disk=disk, lock_wait_s=0.0):
        pass


RECOVERIES: dict[str, Callable[[Path, SimulatedDisk], object]] = {
    "recover": lambda model_dir, disk: recover(model_dir, disk=disk, lock_wait_s=0.0),
    "attach": lambda model_dir, disk: recover(model_dir, disk=disk, lock_wait_s=0.0, is_folding=False),
    "begin": _begin,
    "load": _load,
}


def prefixes(recorded: Recorded, log: list[Operation] | None = None) -> Iterator[Platter]:
    """The platter after each operation of the log (or of a changed one); one object that moves on."""
    platter = Platter(recorded.initial)
    for op in recorded.log if log is None else log:
        platter.apply(op)
        if op.kind != "sync" and op.kind != "sync_dir":  # which takes possibilities away and gives none
            yield platter


def _synced(*kinds: str, num_kept: int = 0) -> Callable[[Path], None]:
    def prepare(model_dir: Path) -> None:
        for version, kind in enumerate(kinds, 1):
            sync(model_dir, version, kind, num_kept=num_kept)

    return prepare


def _sync(version: int, kind: str, num_kept: int = 0) -> Callable[[Path, SimulatedDisk], object]:
    return lambda model_dir, disk: sync(model_dir, version, kind, num_kept=num_kept, disk=disk)


def _outcome(version: int, *kept: int) -> Outcome:
    return Outcome(version, kept, known(version).weights)


def _sync_beside_a_snapshot(model_dir: Path, disk: SimulatedDisk) -> None:
    with snapshot(model_dir, disk=disk, lock_wait_s=0.0):
        sync(model_dir, 3, "full", num_kept=4, disk=disk)


_TRUTH = {version: known(version) for version in range(10)}
# Version 3 is version 1 again; the jobs that were applied since are not to be trained once more.
_RESTORED = {**_TRUTH, 3: Known(1, known(2).applied_seq, known(1).optimizer)}

SCENARIOS = [
    Scenario("first full sync", lambda model_dir: None, _sync(1, "full"), UNSYNCED, _outcome(1), _TRUTH),
    Scenario(
        "first full sync, history", lambda model_dir: None, _sync(1, "full", 4), UNSYNCED, _outcome(1, 0), _TRUTH
    ),
    Scenario("full sync", _synced("full"), _sync(2, "full"), _outcome(1), _outcome(2), _TRUTH),
    Scenario(
        "full sync, history",
        _synced("full", num_kept=4),
        _sync(2, "full", 4),
        _outcome(1, 0),
        _outcome(2, 0, 1),
        _TRUTH,
    ),
    Scenario("delta", _synced("full"), _sync(2, "delta"), _outcome(1), _outcome(2), _TRUTH),
    Scenario(
        "delta after delta, history",
        _synced("full", "delta", num_kept=4),
        _sync(3, "delta", 4),
        _outcome(2, 0, 1),
        _outcome(3, 0, 1, 2),
        _TRUTH,
    ),
    Scenario("delta after delta", _synced("full", "delta"), _sync(3, "delta"), _outcome(2), _outcome(3), _TRUTH),
    Scenario(
        "full after delta, history",
        _synced("full", "delta", num_kept=4),
        _sync(3, "full", 4),
        _outcome(2, 0, 1),
        _outcome(3, 0, 1, 2),
        _TRUTH,
    ),
    Scenario("full after delta", _synced("full", "delta"), _sync(3, "full"), _outcome(2), _outcome(3), _TRUTH),
    Scenario("fold", _synced("full", "delta"), RECOVERIES["load"], _outcome(2), _outcome(2), _TRUTH),
    Scenario(
        "fold, history",
        _synced("full", "delta", num_kept=4),
        RECOVERIES["recover"],
        _outcome(2, 0, 1),
        _outcome(2, 0, 1),
        _TRUTH,
    ),
    Scenario(
        "compact",
        _synced("full", "full", num_kept=4),
        lambda model_dir, disk: compact(model_dir, disk=disk, lock_wait_s=0.0),
        _outcome(2, 0, 1),
        _outcome(2, 0, 1),
        _TRUTH,
    ),
    Scenario(
        "restore",
        _synced("full", "delta", num_kept=4),
        lambda model_dir, disk: restore_version(model_dir, 1, disk=disk, lock_wait_s=0.0),
        _outcome(2, 0, 1),
        Outcome(3, (0, 1, 2), 1),
        _RESTORED,
    ),
    Scenario(
        "sync beside a snapshot",
        _synced("full", "delta", num_kept=4),
        _sync_beside_a_snapshot,
        _outcome(2, 0, 1),
        _outcome(3, 0, 1, 2),
        _TRUTH,
    ),
    Scenario(
        "forget",
        _synced("full", "full", "delta", num_kept=4),
        lambda model_dir, disk: forget(model_dir, disk=disk, lock_wait_s=0.0),
        _outcome(3, 0, 1, 2),
        Outcome(None, (), 2),
        _TRUTH,
    ),
]
