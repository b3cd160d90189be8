"""Each protocol of a checkpoint as a short program on a simulated disk, and what it may leave behind."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from platter import Platter, State, read_state
from simulated_disk import FLUSHES, Killed, Operation, SimulatedDisk
from small_model import (
    SHARDS,
    STRANGER,
    STRANGERS_FILE,
    STRANGERS_SHARD,
    Known,
    Outcome,
    known,
    make_model,
    sync,
)

from apollo_ipc.checkpoint import (
    begin,
    compact,
    forget,
    loading,
    pin_version,
    read_commit,
    recover,
    restore_version,
    snapshot,
)

UNSYNCED = Outcome(None, (), 0)
KNOWN = {version: known(version) for version in range(5)}


class Scenario(NamedTuple):
    """`prepare` is done on a disk that loses nothing; `run` is what the power is cut in.

    before, after: the outcomes that are right until `run` has returned, and from then on `after` alone.
    """

    protocol: str
    name: str
    prepare: Callable[[Path, SimulatedDisk], object]
    run: Callable[[Path, SimulatedDisk], object]
    before: Outcome
    after: Outcome
    truth: dict[int, Known] = KNOWN
    is_killed: bool = True  # whether to kill it as well: not where it is more than one process
    is_downloaded: bool = (
        False  # just now: nobody has flushed the shards, and before `after` nothing is promised
    )


class Recorded(NamedTuple):
    """One run; `start`: where in the log it was killed and the next process began."""

    what: str
    initial: State
    log: list[Operation]
    start: int = 0
    unflushed: tuple[str, ...] = ()


def record(scenario: Scenario, work_dir: Path, *, kill_before: int | None = None, then: str = "") -> Recorded:
    """The log of one run; with `kill_before`, of one that is killed there, and of `then`, done by another
    process afterwards: "recover", "begin", "load". What that has left must not go away again."""
    model_dir = make_model(work_dir / "recorded")
    disk = SimulatedDisk(model_dir)
    scenario.prepare(model_dir, disk)
    initial = read_state(model_dir)
    disk.log.clear()
    disk.allow(scenario.before, scenario.after)
    if kill_before is None:
        scenario.run(model_dir, disk)
        disk.allow(scenario.after, is_finished=True)
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
        if then != "begin":  # which promises nothing before its own commit
            disk.allow(_left(model_dir, scenario), is_finished=True)
    shutil.rmtree(model_dir)
    what = f"{scenario.protocol}, {scenario.name}"
    if kill_before is not None:
        what += f", killed before operation {kill_before}, then {then}"
    unflushed = tuple(SHARDS) if scenario.is_downloaded else ()
    return Recorded(what, initial, disk.log, kill_before or 0, unflushed)


def record_killed(
    scenario: Scenario, undisturbed: Recorded, work_dir: Path, rng: random.Random
) -> Iterator[Recorded]:
    """Runs that are killed before each of its operations, or in the middle of it, and then recovered."""
    for index, op in enumerate(undisturbed.log):
        if op.kind != "mark" and scenario.is_killed:
            yield record(scenario, work_dir, kill_before=index, then=rng.choice([*RECOVERIES]))


def _left(model_dir: Path, scenario: Scenario) -> Outcome:
    commit = read_commit(model_dir)
    found = (None, None) if commit is None else (commit.weight_version, commit.pinned)
    if scenario.before == scenario.after or found == (scenario.after.version, scenario.after.pinned):
        return scenario.after
    assert found == (scenario.before.version, scenario.before.pinned)
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


def moments(
    initial: State, log: list[Operation], start: int = 0, unflushed: tuple[str, ...] = ()
) -> Iterator[tuple[Operation, Platter]]:
    """The platter after each operation of the log, from number `start` on; one object that moves on."""
    platter = Platter(initial, unflushed)
    for n, op in enumerate(log):
        platter.apply(op)
        if n >= start and op.kind not in FLUSHES:  # which take possibilities away and give none
            yield op, platter


def _synced(*kinds: str, num_kept: int = 0) -> Callable[[Path, SimulatedDisk], None]:
    def prepare(model_dir: Path, disk: SimulatedDisk) -> None:
        for version, kind in enumerate(kinds, 1):
            sync(model_dir, version, kind, num_kept=num_kept, disk=disk)

    return prepare


def _sync(version: int, kind: str, num_kept: int = 0) -> Callable[[Path, SimulatedDisk], object]:
    return lambda model_dir, disk: sync(model_dir, version, kind, num_kept=num_kept, disk=disk)


def _pinned(*kinds: str) -> Callable[[Path, SimulatedDisk], None]:
    """Version 1 is pinned, and each sync of `kinds` keeps one version beside it."""

    def prepare(model_dir: Path, disk: SimulatedDisk) -> None:
        sync(model_dir, 1, "full", num_kept=1, disk=disk)
        pin_version(model_dir, 1, disk=disk)
        for version, kind in enumerate(kinds, 2):
            sync(model_dir, version, kind, num_kept=1, disk=disk)

    return prepare


def _pin(weight_version: int | None) -> Callable[[Path, SimulatedDisk], object]:
    return lambda model_dir, disk: pin_version(model_dir, weight_version, disk=disk, lock_wait_s=0.0)


def _pin_and_sync(model_dir: Path, disk: SimulatedDisk) -> None:
    """Once the pin has returned, the next syncs keep what it was set on."""
    disk.allow(_outcome(2, 1), _outcome(2, 1, pinned=1))
    _pin(1)(model_dir, disk)
    disk.allow(_outcome(2, 1, pinned=1), _outcome(3, 1, 2, pinned=1))
    sync(model_dir, 3, "delta", num_kept=1, disk=disk)
    disk.allow(_outcome(3, 1, 2, pinned=1), _outcome(4, 1, 3, pinned=1))
    sync(model_dir, 4, "full", num_kept=1, disk=disk)


def _outcome(version: int, *kept: int, pinned: int | None = None) -> Outcome:
    return Outcome(version, kept, known(version).weights, pinned)


def _sync_beside_a_snapshot(model_dir: Path, disk: SimulatedDisk) -> None:
    with snapshot(model_dir, disk=disk, lock_wait_s=0.0):
        sync(model_dir, 3, "full", num_kept=4, disk=disk)


def _sync_and_a_stranger(model_dir: Path, disk: SimulatedDisk) -> None:
    """A full sync, and after it someone replaces a shard, durably and without a word to anybody."""
    disk.allow(_outcome(1), _outcome(2))
    sync(model_dir, 2, "full", disk=disk)
    disk.allow(_outcome(2), STRANGER)
    name = next(iter(SHARDS))
    file = disk.create(model_dir / STRANGERS_FILE)
    disk.write(file, STRANGERS_SHARD)
    disk.sync(file)
    disk.close(file)
    disk.rename(model_dir / STRANGERS_FILE, model_dir / name)
    disk.sync_dir(model_dir)


SCENARIOS = [
    Scenario("full sync", "the first", _synced(), _sync(1, "full"), UNSYNCED, _outcome(1)),
    Scenario("full sync", "the first, history", _synced(), _sync(1, "full", 4), UNSYNCED, _outcome(1, 0)),
    Scenario("full sync", "the second", _synced("full"), _sync(2, "full"), _outcome(1), _outcome(2)),
    Scenario(
        "full sync",
        "the second, history",
        _synced("full", num_kept=4),
        _sync(2, "full", 4),
        _outcome(1, 0),
        _outcome(2, 0, 1),
    ),
    Scenario(
        "full sync",
        "then a stranger",
        _synced("full"),
        _sync_and_a_stranger,
        _outcome(1),
        STRANGER,
        is_killed=False,
    ),
    *(
        Scenario(
            protocol,
            f"of a downloaded model{', history' * bool(num_kept)}",
            _synced(),
            _sync(1, kind, num_kept),
            UNSYNCED,
            _outcome(1, *kept),
            is_killed=False,
            is_downloaded=True,
        )
        for protocol, kind, num_kept, kept in (
            ("full sync", "full", 4, [0]),
            ("delta", "delta", 0, []),
            ("delta", "delta", 4, [0]),
        )
    ),
    Scenario("delta", "no history", _synced("full"), _sync(2, "delta"), _outcome(1), _outcome(2)),
    Scenario("delta", "the first sync, history", _synced(), _sync(1, "delta", 4), UNSYNCED, _outcome(1, 0)),
    Scenario(
        "delta after delta",
        "no history",
        _synced("full", "delta"),
        _sync(3, "delta"),
        _outcome(2),
        _outcome(3),
    ),
    Scenario(
        "delta after delta",
        "history",
        _synced("full", "delta", num_kept=4),
        _sync(3, "delta", 4),
        _outcome(2, 0, 1),
        _outcome(3, 0, 1, 2),
    ),
    Scenario(
        "full after delta", "no history", _synced("full", "delta"), _sync(3, "full"), _outcome(2), _outcome(3)
    ),
    Scenario(
        "full after delta",
        "history",
        _synced("full", "delta", num_kept=4),
        _sync(3, "full", 4),
        _outcome(2, 0, 1),
        _outcome(3, 0, 1, 2),
    ),
    Scenario("fold", "no history", _synced("full", "delta"), RECOVERIES["load"], _outcome(2), _outcome(2)),
    Scenario(
        "fold",
        "history",
        _synced("full", "delta", num_kept=4),
        RECOVERIES["recover"],
        _outcome(2, 0, 1),
        _outcome(2, 0, 1),
    ),
    Scenario(
        "compact",
        "two bases",
        _synced("full", "full", num_kept=4),
        lambda model_dir, disk: compact(model_dir, disk=disk, lock_wait_s=0.0),
        _outcome(2, 0, 1),
        _outcome(2, 0, 1),
    ),
    Scenario(
        "compact",
        "over a base that no version needs",
        _pinned("full", "full"),
        lambda model_dir, disk: compact(model_dir, disk=disk, lock_wait_s=0.0),
        _outcome(3, 1, 2, pinned=1),
        _outcome(3, 1, 2, pinned=1),
    ),
    Scenario(
        "full sync",
        "beyond a pin",
        _pinned("delta"),
        _sync(3, "full", 1),
        _outcome(2, 1, pinned=1),
        _outcome(3, 1, 2, pinned=1),
    ),
    Scenario(
        "pin",
        "of an older version",
        _synced("full", "delta", "full", num_kept=2),
        _pin(1),
        _outcome(3, 1, 2),
        _outcome(3, 1, 2, pinned=1),
    ),
    Scenario(
        "pin",
        "moved",
        _pinned("delta", "full"),
        _pin(3),
        _outcome(3, 1, 2, pinned=1),
        _outcome(3, 1, 2, pinned=3),
    ),
    Scenario(
        "pin",
        "taken away",
        _pinned("full", "delta"),
        _pin(None),
        _outcome(3, 1, 2, pinned=1),
        _outcome(3, 1, 2),
    ),
    Scenario(
        "pin",
        "and two syncs",
        _synced("full", "delta", num_kept=1),
        _pin_and_sync,
        _outcome(2, 1),
        _outcome(4, 1, 3, pinned=1),
        is_killed=False,
    ),
    Scenario(
        "restore",
        "of version 1",
        _synced("full", "delta", num_kept=4),
        lambda model_dir, disk: restore_version(model_dir, 1, disk=disk, lock_wait_s=0.0),
        _outcome(2, 0, 1),
        Outcome(3, (0, 1, 2), 1),
        # Version 3 is version 1 again; the jobs that were applied since are not to be trained once more.
        {**KNOWN, 3: Known(1, known(2).applied_seq, known(1).optimizer)},
    ),
    Scenario(
        "sync beside a snapshot",
        "history",
        _synced("full", "delta", num_kept=4),
        _sync_beside_a_snapshot,
        _outcome(2, 0, 1),
        _outcome(3, 0, 1, 2),
    ),
    Scenario(
        "forget",
        "history",
        _synced("full", "full", "full", "delta", num_kept=4),
        lambda model_dir, disk: forget(model_dir, disk=disk, lock_wait_s=0.0),
        _outcome(4, 0, 1, 2, 3),
        Outcome(None, (), 3),
    ),
]
