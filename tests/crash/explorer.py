"""Crash states of a recorded run, each brought up again by the real recovery and examined byte for byte."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from platter import State, StoredFile, read_state
from scenarios import RECOVERIES, Recorded, moments
from simulated_disk import Operation, ReadOnlyDisk, SimulatedDisk
from small_model import STRANGER, Known, Outcome, examine, known, sync

from apollo_ipc.checkpoint import read_commit, recover
from apollo_ipc.errors import CheckpointError

NEXT = 9  # weight version of a sync after the crash


class Explorer:
    """Remembers each state that it has brought up: no two of `num_states` are the same.

    Many of them come up as the same directory, to the last byte and time. That is examined once.
    """

    def __init__(self, work_dir: Path, truth: dict[int, Known], rng: random.Random):
        self.work_dir, self._truth, self._rng = work_dir, truth, rng
        self._found: dict[bytes, Outcome | str] = {}
        self._examined: dict[tuple[Way, bytes], Outcome | str] = {}
        self._unrecovered: dict[bytes, str | None] = {}
        self._nested: set[bytes] = set()

    @property
    def num_states(self) -> int:
        return len(self._found)

    def problems(
        self,
        recorded: Recorded,
        *,
        log: list[Operation] | None = None,
        start: int = 0,
        limit: int,
        num_nested: int = 0,
    ) -> Iterator[str]:
        """States that do not come up as they must, of at most `limit` after each operation from `start` on.

        log: instead of the recorded one. num_nested: after how many of the states after an operation the
        power is cut in the recovery too.
        """
        if recorded.unflushed:
            start = len(log or recorded.log) - 1
        for op, platter in moments(recorded.initial, log or recorded.log, start, recorded.unflushed):
            for i, state in enumerate(platter.states(self._rng, limit)):
                outcome = self.outcome(state)
                if outcome not in platter.allowed:
                    allowed = " or ".join(map(str, platter.allowed))
                    yield f"{recorded.what}: power cut after {op}: {outcome}, where {allowed} is right"
                elif platter.is_finished and (problem := self.problem_unrecovered(state)):
                    yield f"{recorded.what}: power cut after the end: {problem}"
                elif i < num_nested:
                    yield from self._cut_again(state, outcome, limit)

    def _cut_again(self, state: State, outcome: Outcome, limit: int) -> Iterator[str]:
        """A power cut inside the recovery: whatever that loses, the next one comes to the same."""
        if state.key() in self._nested:
            return
        self._nested.add(state.key())
        how = self._rng.choice([*RECOVERIES])
        root = self._materialise(state)
        disk = SimulatedDisk(root, process=1)
        RECOVERIES[how](root, disk)
        shutil.rmtree(root)
        for op, platter in moments(state, disk.log):
            for second in platter.states(self._rng, limit):
                if (found := self.outcome(second)) != outcome:
                    yield f"a second power cut in {how}, after {op}: {found}, before it {outcome}"

    def outcome(self, state: State) -> Outcome | str:
        """What recovery makes of it, or in words how that is wrong."""
        key = state.key()
        if key not in self._found:
            way = WAYS[key[0] % len(WAYS)]
            root = self._materialise(state if way.are_times_kept else _without_times(state))
            self._found[key] = _in_words(root, lambda: self._come_up(way, root))
            shutil.rmtree(root)
        return self._found[key]

    def _come_up(self, way: Way, root: Path) -> Outcome | str:
        RECOVERIES[way.first](root, SimulatedDisk(root, process=2))
        left = way, read_state(root).key()
        if left not in self._examined:
            self._examined[left] = _in_words(root, lambda: way.examine(root, self._truth))
        return self._examined[left]

    def problem_unrecovered(self, state: State) -> str | None:
        """What is wrong for one who can only read, after a protocol has come to its end."""
        key = state.key()
        if key not in self._unrecovered:
            root = self._materialise(state)
            self._unrecovered[key] = _in_words(root, lambda: _read_only(root, self._truth))
            shutil.rmtree(root)
        return self._unrecovered[key]

    def _materialise(self, state: State) -> Path:
        root = self.work_dir / f"state-{len(self._found)}"
        state.materialise(root)
        return root


def _in_words(root: Path, function: Callable):
    """What it returns, or in words what is wrong with the directory."""
    try:
        return function()
    except (AssertionError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}".replace(str(root), "")


def _read_only(root: Path, truth: dict[int, Known]) -> None:
    recover(root, disk=ReadOnlyDisk(), is_folding=False)
    commit = read_commit(root)
    is_folded = commit is None or commit.delta is None
    examine(root, truth, is_folded=is_folded, is_clean=False)


class Way(NamedTuple):
    """`first` of RECOVERIES brings a state up, `examine` says what that has left."""

    first: str
    examine: Callable[[Path, dict[int, Known]], Outcome]
    are_times_kept: bool = True


def _is_recovered(root: Path, truth: dict[int, Known], **details) -> Outcome:
    outcome = examine(root, truth, **details)
    again = SimulatedDisk(root, process=9)
    assert not recover(root, disk=again), "recovery has found more to do"
    assert {op.kind for op in again.log} <= {"sync_dir"}, "recovery writes where there is nothing to do"
    return outcome


def _is_without_fold(root: Path, truth: dict[int, Known]) -> Outcome:
    """A delta is beside its shards; and then recovery comes to the same."""
    outcome = examine(root, truth, is_folded=False)
    recover(root, disk=SimulatedDisk(root, process=3), lock_wait_s=0.0)
    assert _is_recovered(root, truth) == outcome
    return outcome


def _is_synced_next(kind: str, root: Path, truth: dict[int, Known]) -> Outcome:
    """The next sync needs no recovery by hand, and keeps what the crash has left as an older version."""
    outcome = examine(root, truth, is_folded=False)
    if outcome == STRANGER:
        return outcome
    sync(root, NEXT, kind, num_kept=9, disk=SimulatedDisk(root, process=3))
    # Without a record, what the shards hold becomes a version 0 of its own.
    before = (*outcome.kept, outcome.version) if outcome.version is not None else (0,)
    unrecorded = {0: known(0)._replace(weights=outcome.weights)} if outcome.version is None else {}
    recover(root, disk=SimulatedDisk(root, process=4), lock_wait_s=0.0)
    found = _is_recovered(root, truth | unrecorded | {NEXT: known(NEXT)})
    assert found == Outcome(NEXT, before, NEXT, outcome.pinned), f"{found} after {outcome} and another sync"
    return outcome


WAYS = [
    *(Way("recover", _is_recovered) for _ in range(8)),
    Way("recover", partial(_is_recovered, are_times_kept=False), are_times_kept=False),
    Way("begin", _is_without_fold),
    Way("attach", _is_without_fold),
    Way("begin", partial(_is_synced_next, "full")),
    Way("begin", partial(_is_synced_next, "delta")),
]


def _without_times(state: State) -> State:
    """Every file's time is another: a power cut may take it, where a file system keeps it apart."""
    return State(
        {
            path: file and StoredFile(file.data, file.mtime_ns + 7, file.mode, file.identity)
            for path, file in state.tree.items()
        }
    )
