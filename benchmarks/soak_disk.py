"""What a kill has left on disk, asked before anything has repaired it. For soak.py."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

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


def optimizer_steps(model_dir: Path) -> int:
    """The step counter in the optimizer file of the last commit: its own, from no queue. 0 without a file."""
    commit = read_commit(model_dir)
    if commit is None or commit.optimizer is None:
        return 0
    with safe_open(model_dir / ".apollo" / commit.optimizer.name, "pt") as file:
        counts = {int(file.get_tensor(name)) for name in file.keys() if name.endswith(".step")}  # noqa: SIM118
    if len(counts) != 1:
        raise CheckpointError(f"parameters have counted {sorted(counts)} steps: they should agree")
    return counts.pop()


def steps_in_commit(commit: Commit, jobs: list[JobInfo]) -> tuple[int, int]:
    """The steps that `commit` says are in its weights: of all jobs up to its last that no restore has undone,
    and of a half-done one. At least, at most: those of cancelled jobs go where the weights go back behind
    them."""
    half_done = (commit.extra.get("running") or {}).get("steps_done", 0)
    held = [job for job in jobs if job.seq <= commit.applied_seq and job.state != "undone"]
    cancelled = sum(job.steps_done for job in held if job.state in ("cancelled", "quarantined"))
    most = sum(job.steps_done for job in held) + half_done
    return most - cancelled, most


def is_last_step_torn(state_dir: Path) -> bool:
    marks = StepMarks(state_dir / "step.marks")
    last = marks.read()
    marks.close()
    return last is not None and last.is_torn
