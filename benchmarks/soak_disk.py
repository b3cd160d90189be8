"""What a kill has left on disk, asked before anything has repaired it. For soak.py."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from apollo_worker.trainer.step_marks import StepMarks
from safetensors import safe_open

from apollo_ipc.checkpoint import Commit, read_commit, recover, verify
from apollo_ipc.errors import CheckpointError
from apollo_ipc.wire.replies import JobInfo


def copy_problems(model_dir: Path) -> list[str]:
    """What is wrong with a copy of the directory, once that was recovered. Nobody may be writing to it."""
    if read_commit(model_dir) is None:
        return []
    with tempfile.TemporaryDirectory(dir=model_dir.parent) as scratch:
        copy = shutil.copytree(model_dir, Path(scratch) / "model", copy_function=shutil.copy2)
        try:
            recover(copy)
            return [f"{p.shard}: {p.tensor}: {p.message}" for p in verify(copy)]
        except CheckpointError as error:
            return [error.message]


def steps_in_weights(model_dir: Path) -> int:
    """As the trainer counted those that ended in the weights of the last commit: from no queue."""
    commit = read_commit(model_dir)
    return commit.extra.get("optimizer_steps", 0) if commit else 0


def moment_steps(model_dir: Path) -> int:
    """The step counter in the optimizer file of the last commit, 0 without a file. At most that of the
    weights: a trainer that is killed leaves these, the next one's moments are those of the last commit."""
    commit = read_commit(model_dir)
    if commit is None or commit.optimizer is None:
        return 0
    with safe_open(model_dir / ".apollo" / commit.optimizer.name, "pt") as file:
        counts = {int(file.get_tensor(name)) for name in file.keys() if name.endswith(".step")}  # noqa: SIM118
    if len(counts) != 1:
        raise CheckpointError(f"parameters have counted {sorted(counts)} steps: they should agree")
    return counts.pop()


class HalfDone:
    """Steps of jobs that a restore undid, and that are in the weights all the same: the restored version had
    been committed in the middle of a job."""

    def __init__(self) -> None:
        self._since: list[tuple[int, int]] = [(0, 0)]  # (weight version from which on, steps)

    def of(self, weight_version: int) -> int:
        return next(steps for since, steps in reversed(self._since) if since <= weight_version)

    def restored(self, before: Commit, weight_version: int, after: Commit) -> None:
        """before, after: the commits around the restore."""
        one = next(one for one in [before, *before.history] if one.weight_version == weight_version)
        self._since.append((after.weight_version, self.of(weight_version) + _of_running(one.extra)))


def steps_in_commit(commit: Commit, jobs: list[JobInfo], half_done: HalfDone) -> tuple[int, int]:
    """The steps that `commit` says are in its weights: of all jobs up to its last that no restore has undone,
    and of half-done ones. At least, at most: those of cancelled jobs go where the weights go back behind
    them."""
    held = [job for job in jobs if job.seq <= commit.applied_seq and job.state != "undone"]
    cancelled = sum(job.steps_done for job in held if job.state in ("cancelled", "quarantined"))
    most = (
        sum(job.steps_done for job in held) + _of_running(commit.extra) + half_done.of(commit.weight_version)
    )
    return most - cancelled, most


def _of_running(extra: dict[str, Any]) -> int:
    return (extra.get("running") or {}).get("steps_done", 0)


def is_last_step_torn(state_dir: Path) -> bool:
    marks = StepMarks(state_dir / "step.marks")
    last = marks.read()
    marks.close()
    return last is not None and last.is_torn
