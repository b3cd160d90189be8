"""What is found on disk after each kill, before anything has repaired it; and what must come of it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from apollo_worker.marks import StepMarks
from safetensors import safe_open

from apollo_ipc.checkpoint import Commit, read_commit, recover, verify
from apollo_ipc.errors import CheckpointError


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


class Ledger:
    """How many steps of the live weights the optimizer's counter cannot know of.

    A trainer that dies between two steps leaves weights that are newer than every optimizer state on disk;
    the next one goes on with the weights as they are and the moments of the last commit.
    """

    def __init__(self, model_dir: Path, state_dir: Path):
        self._model_dir, self._state_dir = model_dir, state_dir
        self._of_serial: dict[int, int] = {0: 0}
        self.num_behind = 0  # of the live weights
        self.num_torn = 0

    def note_death(self, is_vllm_dead: bool) -> None:
        """After a trainer or vLLM was killed, before the next trainer has begun."""
        commit = read_commit(self._model_dir)
        of_commit = self.behind(commit)
        marks = StepMarks(self._state_dir / "step.marks")
        last = marks.read()
        marks.close()
        is_torn = last is not None and last.is_torn
        self.num_torn += is_torn and not is_vllm_dead
        if is_vllm_dead or is_torn:
            self.num_behind = of_commit  # the next weights are those of the commit
            return
        steps = self._steps_since(commit, last.job_id if last else "", last.ended if last else 0)
        self.num_behind = of_commit + steps

    def behind(self, commit: Commit | None) -> int:
        """Of a commit; one seen for the first time was made of the present live weights."""
        return self._of_serial.setdefault(commit.serial if commit else 0, self.num_behind)

    def _steps_since(self, commit: Commit | None, last_job: str, ended: int) -> int:
        path = self._state_dir / "queue.sqlite"
        with closing(sqlite3.connect(path, timeout=30)) as db:
            rows = db.execute(
                "SELECT job_id, state, steps_done FROM jobs WHERE seq > ?",
                (commit.applied_seq if commit else 0,),
            ).fetchall()
        running = (commit.extra.get("running") or {}) if commit else {}
        steps = sum(done for _, _, done in rows) - running.get("steps_done", 0)
        for job_id, state, done in rows:
            # Its last step ended, but was not recorded.
            steps += state == "running" and last_job != "" and job_id.endswith(last_job) and ended == done + 1
        return steps
