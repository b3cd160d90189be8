"""An exception at every call of the file layer, SQLite, the device copies and the marks, one at a time.

Each protocol of the trainer's loop runs once to count its points (faults.py). Then, for each point: all is
brought back to the moment before, the protocol runs and raises there, and the next trainer goes on, on the
same vLLM or on the next one, which has loaded the last checkpoint. Afterwards the weights themselves say
which steps are in them (ledger.py): none torn, none lost, none twice, all in order; the disk says the same.

What is left out: a fault of the recovery after a fault (test_faults.py has some), and errors that a layer
reports without any call of ours (SIGBUS of a mapped file).
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from apollo_worker.jobs.queue import MAX_CRASHES, JobQueue
from apollo_worker.trainer import loop
from apollo_worker.trainer.attachment import Attachment
from apollo_worker.trainer.loop import JobStopped, MainLoop
from apollo_worker.trainer.recovery import Recovery
from apollo_worker.trainer.step_marks import StepMarks
from faults import Point
from ledger import World, restore_to

HARMFUL, CANCELLED = 9, 8
STEP = ("device write",)  # what raises there is the job's own error
NUM_QUICK = 1  # points of each protocol in the default run: each commit another
MAX_ALIKE = 24  # calls of one kind: of more (a loop over tensors or blocks) the first, the last, some between


class Killed(BaseException):
    """Where it is raised the process would have ended."""


class Protocol(NamedTuple):
    """prepare: undisturbed; when_idle, syncs: as World.run takes them."""

    prepare: Callable[[World], object]
    when_idle: Sequence[Callable[[MainLoop], object]] = ()
    syncs: Mapping[tuple[int, int], str] = MappingProxyType({})
    harmful: int = 0
    may_fail: frozenset[int] = frozenset()


def three_jobs(world: World) -> None:
    for number, num_steps in ((1, 2), (2, 3), (3, 1)):
        world.submit(number, num_steps)


def killed_in_a_step(world: World) -> None:
    """Job 1 is on disk, and job 2 after its first step; job 2 is cut off in its third."""
    three_jobs(world)
    number = 4 * len(world.live) + len(world.live) // 2
    killed = world.run(Point("device write", number), error=Killed(), syncs={(2, 1): "full"})
    assert isinstance(killed, Killed), killed


def killed_after_a_step(world: World) -> None:
    """Its mark is ended, and the queue does not know of it."""
    three_jobs(world)
    killed = world.run(Point("sqlite INSERT", 4), error=Killed(), syncs={(2, 1): "delta"})
    assert isinstance(killed, Killed), killed


def lost_with_vllm(world: World) -> None:
    """Job 1 and a step of job 2 are on disk, the rest was in the memory of a vLLM that has ended."""
    three_jobs(world)
    killed = world.run(Point("publish", 3), error=Killed(), syncs={(2, 1): "delta"})
    assert isinstance(killed, Killed), killed
    world.start_vllm_again()


def three_versions(world: World) -> None:
    three_jobs(world)
    assert world.run(syncs={(2, 0): "full", (3, 0): "delta"}) is None


def a_harmful_job(world: World) -> None:
    world.submit(1, 2)
    assert world.run() is None
    world.submit(HARMFUL, 4)
    world.submit(10, 1)


def a_cancelled_job(world: World) -> None:
    world.submit(1, 1)
    world.submit(CANCELLED, 3)
    killed = world.run(Point("device write", 2 * len(world.live) + 1), error=Killed())
    assert isinstance(killed, Killed), killed
    job_id = next(job_id for job_id, number in world.numbers.items() if number == CANCELLED)
    queue = JobQueue(world.config.state_dir / "queue.sqlite", 1)
    queue.cancel(job_id)
    queue.close()


PROTOCOLS = {
    "jobs and syncs": Protocol(three_jobs, syncs={(1, 1): "full", (2, 1): "delta", (3, 0): "delta"}),
    "a torn step": Protocol(killed_in_a_step),
    "a step not recorded": Protocol(killed_after_a_step, syncs={(3, 0): "full"}),
    "the next vLLM": Protocol(lost_with_vllm),
    "a restore": Protocol(three_versions, when_idle=[restore_to(1)]),
    "a harmful job": Protocol(a_harmful_job, harmful=HARMFUL, may_fail=frozenset({HARMFUL})),
    "a cancelled job": Protocol(a_cancelled_job, may_fail=frozenset({CANCELLED})),
}


@pytest.fixture
def make_world(monkeypatch):
    """In memory where that is possible: what a flush does is not looked at here."""

    @contextmanager
    def make(protocol: Protocol) -> Iterator[World]:
        memory = Path("/dev/shm")
        with (
            tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as base,
            World(Path(base), monkeypatch, protocol.harmful) as world,
        ):
            protocol.prepare(world)
            world.save()
            yield world

    return make


def run(world: World, protocol: Protocol, at: Point | None = None) -> BaseException | None:
    return world.run(at, when_idle=protocol.when_idle, syncs=protocol.syncs)


def points_of(world: World, protocol: Protocol) -> list[Point]:
    assert (raised := run(world, protocol)) is None, raised
    kinds: dict[str, list[Point]] = {}
    for point in dict.fromkeys(world.faults.seen):
        kinds.setdefault(point.kind, []).append(point)
    return [point for alike in kinds.values() for point in spread(alike)]


def spread(points: list[Point]) -> list[Point]:
    if len(points) <= MAX_ALIKE:
        return points
    return [points[round(n * (len(points) - 1) / (MAX_ALIKE - 1))] for n in range(MAX_ALIKE)]


def problem_at(
    world: World, protocol: Protocol, at: Point, *, is_new_vllm: bool, num_times: int = 1
) -> str | None:
    """What is wrong after it has raised there, in words. num_times: in so many trainers in a row."""
    world.reset()
    for _ in range(num_times):
        raised = run(world, protocol, at)
        if not world.faults.has_raised:  # a thread was faster or slower than when they were counted
            return None
    try:
        if is_new_vllm:
            world.start_vllm_again()
        again = world.run(is_counted=False)
        assert again is None, f"the next trainer: {again!r}"
        world.check(may_fail=protocol.may_fail, is_step=at.kind.startswith(STEP))
    except AssertionError as error:
        then = "the next vLLM" if is_new_vllm else "the next trainer"
        return f"{at} ({raised!r}), then {then}: {error}".partition("\nassert")[0]
    return None


def problems(world: World, protocol: Protocol, points: Sequence[Point], *, first: int = 0) -> Iterator[str]:
    """On the same vLLM and on the next one, in turns."""
    for number, at in enumerate(points, first):
        if problem := problem_at(world, protocol, at, is_new_vllm=number % 2 == 1):
            yield problem


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_exception_anywhere_leaves_what_the_next_trainer_brings_to_one_state(
    name, make_world, pytestconfig
):
    protocol = PROTOCOLS[name]
    with make_world(protocol) as world:
        points = points_of(world, protocol)
        draw = random.Random(pytestconfig.option.crash_seed)
        some = draw.sample(points, NUM_QUICK)
        assert list(problems(world, protocol, some, first=draw.randrange(2))) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_exception_at_every_point_leaves_what_the_next_trainer_brings_to_one_state(
    name, make_world, record_property
):
    protocol = PROTOCOLS[name]
    with make_world(protocol) as world:
        points = points_of(world, protocol)
        layers = Counter(point.kind.partition(" ")[0] for point in points)
        num_all = len(set(world.faults.seen))
        print(f"{name}: raised at {len(points)} of {num_all} points: {dict(layers)}", flush=True)
        record_property("num_points", len(points))
        assert list(problems(world, protocol, points)) == []


# --- a test of the test: without any one guard it fails ---


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def all_ends_the_job(monkeypatch) -> None:
    real = MainLoop.train_steps

    def train_steps(worker, job):
        try:
            real(worker, job)
        except (JobStopped, loop.StepFailed):
            raise
        except Exception as error:
            raise loop.StepFailed from error

    monkeypatch.setattr(MainLoop, "train_steps", train_steps)


def syncs_on_the_way_out(monkeypatch) -> None:
    real = MainLoop.run

    def run(worker):
        detach, worker.attachment.detach = worker.attachment.detach, nothing
        try:
            real(worker)
        except Exception:
            worker.attachment.detach = detach
            worker.stop()
            raise

    monkeypatch.setattr(MainLoop, "run", run)


def clears_the_mark_first(monkeypatch) -> None:
    real = Recovery._reconcile

    def reconcile(recovery, commit):
        recovery.marks.clear(recovery.marks.num_steps)
        return real(recovery, commit)

    monkeypatch.setattr(Recovery, "_reconcile", reconcile)


def knows_the_new_vllm_first(monkeypatch) -> None:
    real = Recovery.at_attach

    def at_attach(recovery, live, commit, *, is_new_boot):
        recovery.set_version(live, recovery._board.state.weight_version)
        return real(recovery, live, commit, is_new_boot=is_new_boot)

    monkeypatch.setattr(Recovery, "at_attach", at_attach)


def keeps_what_it_could_not_attach(monkeypatch) -> None:
    monkeypatch.setattr(Attachment, "_attach_or_detach", Attachment._attach)


GUARDS: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch], object]]] = {
    "only the job's own errors end it": ("jobs and syncs", "sqlite", all_ends_the_job),
    "no sync on the way out": ("jobs and syncs", "sqlite", syncs_on_the_way_out),
    "no sync of torn weights": (
        "a torn step",
        "device",
        lambda m: (syncs_on_the_way_out(m), m.setattr(StepMarks, "is_torn", False)),
    ),
    "a write-back is marked": (
        "a restore",
        "file safe_open",
        lambda m: m.setattr(StepMarks, "begin_write_back", nothing),
    ),
    "the mark goes last": ("a torn step", "sqlite", clears_the_mark_first),
    "the boot is noted last": ("the next vLLM", "sqlite", knows_the_new_vllm_first),
    "a step that ended is recorded": (
        "jobs and syncs",
        "sqlite INSERT",
        lambda m: m.setattr(Recovery, "_running", lambda *_: None),
    ),
    "weights that could not be attached are let go": (
        "the next vLLM",
        "file read_commit",
        keeps_what_it_could_not_attach,
    ),
}


def problem_without(
    world: World, protocol: Protocol, points: Sequence[Point], num_times: int = 1
) -> str | None:
    for is_new_vllm in (False, True):
        for at in points:
            if found := problem_at(world, protocol, at, is_new_vllm=is_new_vllm, num_times=num_times):
                return found
    return None


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS)
def test_without_any_one_guard_an_exception_does_harm_and_is_found(guard, make_world, monkeypatch):
    name, kind, take_out = GUARDS[guard]
    protocol = PROTOCOLS[name]
    with make_world(protocol) as world:
        points = [point for point in points_of(world, protocol) if point.kind.startswith(kind)]
        take_out(monkeypatch)
        found = problem_without(world, protocol, points)
    print(f"without it: {found}")
    assert found, f"nothing was missed at {len(points)} points"


@pytest.mark.slow
def test_a_job_is_not_blamed_for_what_ends_three_trainers_between_its_steps(make_world, monkeypatch):
    protocol = PROTOCOLS["jobs and syncs"]
    with make_world(protocol) as world:
        points = [point for point in points_of(world, protocol) if point.kind == "status"]
        assert problem_without(world, protocol, points, MAX_CRASHES) is None
        monkeypatch.setattr(JobQueue, "release", nothing)
        found = problem_without(world, protocol, points, MAX_CRASHES)
    print(f"without it: {found}")
    assert found is not None
    assert "quarantined" in found
