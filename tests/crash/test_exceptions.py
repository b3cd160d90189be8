"""The file layer raises at each of its calls, in each protocol of a checkpoint; the next process recovers.

Each call raises before it has done anything, and again after it has done everything: a failed flush or close
says nothing of the bytes. What is raised is the layer's own CheckpointError, or an error that nobody expects.
What must hold is what holds after a power cut (test_power_cuts.py): the version before or the version after,
all of it; where the protocol returns in spite of the error, the version after.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from explorer import WAYS, Way
from scenarios import RECOVERIES, SCENARIOS, Scenario
from simulated_disk import SimulatedDisk
from small_model import make_model

from apollo_ipc.errors import CheckpointError

CALLS = ("create", "open", "write", "sync", "close", "sync_dir", "rename", "link", "unlink", "mkdir", "rmdir")
NUM_QUICK = 40  # points of all protocols in the default run, each commit others


def of_the_layer() -> Exception:
    error = CheckpointError("cannot flush: Input/output error")
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    return error


def unexpected() -> Exception:
    return RuntimeError("nobody has thought of this")


class RaisingDisk(SimulatedDisk):
    """Raises at call number `at` (from 0), once; is_done: after its work."""

    def __init__(self, root: Path, at: int | None, error: Callable[[], Exception], *, is_done: bool = False):
        super().__init__(root, process=1)
        self.calls: list[str] = []
        self.at, self.error, self.is_done = at, error, is_done

    def reach(self, name: str, path: object) -> bool:
        """Whether it is this call; raises where it shall do nothing."""
        is_here = len(self.calls) == self.at
        self.calls.append(f"{name} {Path(getattr(path, 'path', path)).name}")
        if is_here and not self.is_done:
            raise self.error()
        return is_here

    @contextmanager
    def lock(self, path: Path, wait_s: float, *, is_shared: bool = False):
        is_here = self.reach("lock", path)
        with super().lock(path, wait_s, is_shared=is_shared):
            if is_here:
                raise self.error()
            yield


def _raising(name: str) -> Callable:
    def call(self: RaisingDisk, *args):
        is_here = self.reach(name, args[-1] if name in ("rename", "link") else args[0])
        result = getattr(SimulatedDisk, name)(self, *args)
        if is_here:
            raise self.error()
        return result

    return call


for _name in CALLS:
    setattr(RaisingDisk, _name, _raising(_name))


def calls_of(scenario: Scenario, work_dir: Path) -> list[str]:
    root = make_model(work_dir / "counted")
    scenario.prepare(root, SimulatedDisk(root))
    disk = RaisingDisk(root, None, unexpected)
    scenario.run(root, disk)
    shutil.rmtree(root)
    return disk.calls


def problem_at(
    scenario: Scenario, at: int, error: Callable, is_done: bool, way: Way, work_dir: Path
) -> str | None:
    root = make_model(work_dir / "raised")
    scenario.prepare(root, SimulatedDisk(root))
    disk = RaisingDisk(root, at, error, is_done=is_done)
    disk.allow(scenario.before, scenario.after)
    try:
        scenario.run(root, disk)
    except (CheckpointError, RuntimeError):
        allowed = [op.allowed for op in disk.log if op.kind == "mark"][-1]
    else:
        allowed = {scenario.after}
    try:
        RECOVERIES[way.first](root, SimulatedDisk(root, process=2))
        outcome = way.examine(root, scenario.truth)
        assert outcome in allowed, f"{outcome}, where {' or '.join(map(str, allowed))} is right"
    except (AssertionError, CheckpointError) as wrong:
        when = "after" if is_done else "before"
        return f"{scenario.protocol}, {scenario.name}: raised {when} {disk.calls[at]}: {wrong}"
    finally:
        shutil.rmtree(root)
    return None


def points(scenarios: list[Scenario], work_dir: Path) -> list[tuple[Scenario, int, Callable, bool]]:
    return [
        (scenario, at, error, is_done)
        for scenario in scenarios
        for at in range(len(calls_of(scenario, work_dir)))
        for error in (of_the_layer, unexpected)
        for is_done in (False, True)
    ]


def test_an_exception_at_some_call_of_a_protocol_leaves_one_version_whole(work_dir, pytestconfig):
    draw = random.Random(pytestconfig.option.crash_seed)
    some = draw.sample(points(SCENARIOS, work_dir), NUM_QUICK)
    assert [found for point in some if (found := problem_at(*point, draw.choice(WAYS), work_dir))] == []


@pytest.mark.slow
@pytest.mark.parametrize("protocol", dict.fromkeys(scenario.protocol for scenario in SCENARIOS))
def test_an_exception_at_every_call_of_a_protocol_leaves_one_version_whole(
    protocol, work_dir, record_property
):
    every = points([scenario for scenario in SCENARIOS if scenario.protocol == protocol], work_dir)
    found = [problem_at(*point, way, work_dir) for point, way in zip(every, cycle(WAYS), strict=False)]
    record_property("num_points", len(every))
    print(f"{protocol}: {len(every)} points, {sum(one is not None for one in found)} wrong", flush=True)
    assert [one for one in found if one] == []
