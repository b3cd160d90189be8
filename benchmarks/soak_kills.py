"""What is killed when, and started again. For soak.py."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from soak_clients import JobStream
from soak_disk import (
    HalfDone,
    copy_problems,
    is_last_step_torn,
    moment_steps,
    steps_in_commit,
    steps_in_weights,
)
from soak_faults import raise_once, restore_live, restore_on_disk
from soak_system import System, runs, wait_for

from apollo_ipc.checkpoint import read_commit
from apollo_ipc.wire.replies import ENDED_STATES

WORKER_PARTS = ("front", "trainer", "worker")
IN_SYNC_S = 3.0  # at most so long is waited for a sync to begin


def plan_kills(num: int, vllm_every: int, seed: int) -> list[tuple[str, bool]]:
    """(what, inside a sync) of each kill; vLLM alone and vLLM with the worker in turns."""
    draw = random.Random(seed)
    kills = []
    for number in range(1, num + 1):
        if vllm_every and number % vllm_every == 0:
            what = ("vllm", "vllm+worker")[number // vllm_every % 2]
        else:
            what = draw.choice(WORKER_PARTS)
        kills.append((what, draw.random() < 0.5))
    return kills


def plan_events(options: argparse.Namespace) -> list[tuple[str, bool]]:
    """Those of plan_kills, with "exception", "restore" and "live restore" among them."""
    events = plan_kills(options.kills, options.vllm_every, options.seed)
    draw = random.Random(options.seed + 2)
    others = ["exception"] * options.exceptions + ["restore", "live restore"] * options.restores
    for what in others:
        events.insert(draw.randrange(len(events) + 1), (what, False))
    return events


class Killer:
    """restored: the versions that were; jobs are held while it restores."""

    def __init__(self, system: System, options: argparse.Namespace, problems: list[str], jobs: JobStream):
        self._system, self._options, self._problems = system, options, problems
        self._jobs = jobs
        self.restored: set[int] = set()
        self.half_done = HalfDone()
        self._raised: list[str] = []
        self._random = random.Random(options.seed + 1)
        self._num_torn_steps = self._num_in_sync = self._num_torn_checkpoints = 0
        self._serving_s: list[float] = []
        self._training_s: list[float] = []

    def run(self) -> dict[str, Any]:
        """Its figures. Raises SoakFailed where something does not come back."""
        system, started, num = self._system, time.monotonic(), 0
        kinds: dict[str, int] = {}
        for what, is_in_sync in plan_events(self._options):
            if time.monotonic() - started > self._options.minutes * 60:
                break
            if what in ("exception", "restore", "live restore"):
                system.wait_until_training()
                self._disturb(what)
                continue
            # Now and then a kill meets a worker that has not come back yet.
            if what in WORKER_PARTS and num and self._random.random() < 0.2:
                time.sleep(self._random.uniform(0, 8))
            else:
                system.wait_until_training()
                done = self._num_done()
                wait_for(lambda d=done: self._num_done() > d, "a step after a kill", 900, 0.3)
                time.sleep(self._random.uniform(0, 5))
            if is_in_sync:
                is_in_sync = self._wait_into_sync()
                self._num_in_sync += is_in_sync
            num += 1
            kinds[what] = kinds.get(what, 0) + 1
            self.kill(what)
            say(f"kill {num}: {what}{', inside a sync' if is_in_sync else ''}")
        system.wait_until_training()
        return {
            "kills": num,
            "kills_by_kind": kinds,
            "exceptions": len(self._raised),
            "exceptions_at": self._raised,
            "restored_versions": sorted(self.restored),
            "kills_inside_a_sync": self._num_in_sync,
            "torn_steps": self._num_torn_steps,
            "torn_checkpoints": self._num_torn_checkpoints,
            "recovery_after_vllm_kill_s": median(self._serving_s),
            "training_after_vllm_kill_s": median(self._training_s),
            "recoveries_s": self._serving_s,
        }

    def _disturb(self, what: str) -> None:
        if what == "exception":
            self._raised.append(raise_once(self._system, self._random))
            say(f"exception {len(self._raised)}: {self._raised[-1]}")
            return
        wait_for(self._has_older_version, "an older version to be restored", 600, 3.0)
        self._jobs.hold.set()
        ids = {job_id for job_id, _ in self._jobs.acknowledged.values()}
        wait_for(lambda: all(job.state in ENDED_STATES for job in self._system.jobs()), "idleness", 900, 1.0)
        assert ids <= {job.job_id for job in self._system.jobs()}
        before = read_commit(self._system.model_dir)
        if what == "live restore":
            version = restore_live(self._system, self._random)
        else:
            if self._system.stop_worker():
                self._problems.append("the worker did not end well before a restore")
            self._system.stop_vllm()
            version = restore_on_disk(self._system, self._random)
            self._system.start_worker()
            self._system.start_vllm()
            self._system.wait_until_training()
        after = read_commit(self._system.model_dir)
        assert before is not None
        assert after is not None
        self.half_done.restored(before, version, after)
        self.restored.add(version)
        say(f"{what}: version {version}")
        self._jobs.hold.clear()

    def _has_older_version(self) -> bool:
        """A sync after each question makes one as soon as something has been trained."""
        if (commit := read_commit(self._system.model_dir)) is not None and commit.history:
            return True
        self._system.ask_for_sync("full")
        return False

    def kill(self, what: str) -> None:
        """And start it again, as systemd would."""
        system, killed_at, trainer = self._system, time.monotonic(), None
        if is_vllm := what.startswith("vllm"):
            system.kill_vllm()
        if what != "vllm":
            trainer = system.kill_worker(what.removeprefix("vllm+"))
        if what not in ("vllm", "front"):
            self._look_at_disk()
        if what not in ("vllm", "trainer"):
            system.start_worker()
        if is_vllm:
            self._serving_s.append(system.start_vllm() + system.started_at - killed_at)
            system.wait_until_training()
            self._training_s.append(time.monotonic() - killed_at)
            say(f"  serving after {self._serving_s[-1]:.1f} s, training after {self._training_s[-1]:.1f} s")
        elif trainer is not None:  # without its front it finishes its step
            wait_for(lambda: not runs(trainer), "the old trainer's end", 60, 0.005)

    def _look_at_disk(self) -> None:
        """Nobody writes: it must be one checkpoint, whose optimizer has done its steps."""
        system = self._system
        self._num_torn_steps += is_last_step_torn(system.config.state_dir)
        found = copy_problems(system.model_dir)
        if (commit := read_commit(system.model_dir)) is not None:
            steps, moments = steps_in_weights(system.model_dir), moment_steps(system.model_dir)
            least, most = steps_in_commit(commit, system.jobs(), self.half_done)
            if not least <= steps <= most or moments > steps:
                found.append(
                    f"commit {commit.serial}: its jobs have {least} to {most} steps, its weights {steps}, "
                    f"its moments {moments}"
                )
        if found:
            self._num_torn_checkpoints += 1
            self._problems += [f"on disk after a kill: {problem}" for problem in found[:3]]
            say(f"  {found[0]}")

    def _wait_into_sync(self) -> bool:
        """Asks for a sync and returns at some moment inside it; False where none has begun in time."""
        before = self._system.sync_files()
        self._system.ask_for_sync(self._random.choice(("full", "delta")))
        deadline = time.monotonic() + IN_SYNC_S
        while time.monotonic() < deadline:
            if self._system.sync_files() - before:
                time.sleep(self._random.choice((0, 0.005, 0.02, 0.05, 0.1)))
                return True
            time.sleep(0.001)
        return False

    def _num_done(self) -> int:
        return sum(job.steps_done for job in self._system.jobs())


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
