"""What is killed when, and started again. For soak.py."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from soak_ledger import Ledger, copy_problems
from soak_system import System, runs, wait_for

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


class Killer:
    def __init__(self, system: System, ledger: Ledger, options: argparse.Namespace, problems: list[str]):
        self._system, self._ledger, self._options, self._problems = system, ledger, options, problems
        self._random = random.Random(options.seed + 1)
        self._in_sync = self._torn_checkpoints = 0
        self._serving_s: list[float] = []
        self._training_s: list[float] = []

    def run(self) -> dict[str, Any]:
        """Its figures. Raises SoakFailed where something does not come back."""
        system, started, num = self._system, time.monotonic(), 0
        kinds: dict[str, int] = {}
        for what, is_in_sync in plan_kills(self._options.kills, self._options.vllm_every, self._options.seed):
            if time.monotonic() - started > self._options.minutes * 60:
                break
            # Now and then a kill meets a worker that has not come back yet.
            if what in WORKER_PARTS and num and self._random.random() < 0.2:
                time.sleep(self._random.uniform(0, 8))
            else:
                system.wait_until_training()
                done = self._num_done()
                wait_for(lambda d=done: self._num_done() > d, "a step after a kill", 180, 0.3)
                time.sleep(self._random.uniform(0, 5))
            if is_in_sync:
                is_in_sync = self._wait_into_sync()
                self._in_sync += is_in_sync
            num += 1
            kinds[what] = kinds.get(what, 0) + 1
            say(f"kill {num}: {what}{' inside a sync' if is_in_sync else ''}")
            self.kill(what)
        system.wait_until_training()
        return {
            "kills": num,
            "kills_by_kind": kinds,
            "kills_inside_a_sync": self._in_sync,
            "torn_checkpoints": self._torn_checkpoints,
            "recovery_after_vllm_kill_s": median(self._serving_s),
            "training_after_vllm_kill_s": median(self._training_s),
            "recoveries_s": self._serving_s,
        }

    def kill(self, what: str) -> None:
        """And start it again."""
        system, killed_at = self._system, time.monotonic()
        is_vllm = what.startswith("vllm")
        trainer = None
        if is_vllm:
            system.kill_vllm()
        if what != "vllm":
            trainer = system.kill_worker(what.removeprefix("vllm+"))
        if what == "vllm+worker" or what in ("trainer", "worker"):
            self._look_at_disk()
        if what not in ("vllm", "trainer"):
            system.start_worker()
        if not is_vllm:
            if trainer is not None:  # without its front it finishes its step
                wait_for(lambda: not runs(trainer), "the old trainer's end", 60, 0.005)
            self._ledger.note_death(is_vllm_dead=False)
            return
        # A sync that was copied out before vLLM died may still commit; vLLM reads the directory only later.
        system.start_vllm(lambda: (time.sleep(4), self._ledger.note_death(is_vllm_dead=True)))
        self._serving_s.append(time.monotonic() - killed_at)
        system.wait_until_training()
        self._training_s.append(time.monotonic() - killed_at)
        say(f"  serving after {self._serving_s[-1]:.1f} s, training after {self._training_s[-1]:.1f} s")

    def _look_at_disk(self) -> None:
        """Nobody writes: is what lies there one checkpoint?"""
        if found := copy_problems(self._system.model_dir):
            self._torn_checkpoints += 1
            self._problems += [f"after a kill: {problem}" for problem in found[:3]]

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
