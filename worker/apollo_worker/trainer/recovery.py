"""The one place that mends: weights, jobs and marks become those of one state, the last commit's.

Every write of live weights that is not a training step happens in `write_back`, between a mark that is set
before the first byte and cleared after everything else agrees. Whatever raises or kills in between leaves
the mark: nothing is trained, synced or published on it, and the next trainer begins the same write again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import safe_open

from apollo_ipc.checkpoint import Commit, is_current, read_commit, recover, restore_version
from apollo_ipc.checkpoint.disk import WatchedDisk
from apollo_ipc.checkpoint.shards import shard_index
from apollo_ipc.config import Config
from apollo_ipc.errors import ApolloError
from apollo_ipc.wire.replies import JobInfo
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import StatusBoard
from apollo_worker.model.live_model import LiveModel
from apollo_worker.model.live_tensor import Pieced, opened, write
from apollo_worker.trainer.step_marks import LastStep, LiveState, StepMarks, write_state
from apollo_worker.trainer.tally import note_torn_step

log = logging.getLogger(__name__)


class Recovery:
    def __init__(self, config: Config, board: StatusBoard, queue: JobQueue, marks: StepMarks):
        self._config, self._board, self._queue, self.marks = config, board, queue, marks
        self._disk = WatchedDisk(lambda: board.show("restoring"))

    def at_attach(self, live: LiveModel, commit: Commit | None, *, is_new_boot: bool) -> bool:
        """Whether the weights had to be written back. The board's weight version: the newest known, then the
        one that these weights have."""
        if is_new_boot:  # the weights are those that vLLM loaded: the last commit's
            num_queued_again = self._reconcile(commit)
            self.marks.clear(num_steps_of(commit))
            # Last: until here the next trainer sees a new boot.
            self.set_version(live, self._board.state.weight_version + bool(num_queued_again))
            return False
        if not (is_mended := self.mend(live)) and self._knows(commit):
            self._queue.mark_durable(commit.applied_seq)  # the trainer before may have ended just before
        self.set_version(live, self._board.state.weight_version)
        return is_mended

    def mend(self, live: LiveModel) -> bool:
        """After the death of a trainer or an error inside a step. Whether the weights were written back.

        A step that ended but was not recorded is recorded; one that did not end left weights that are neither
        before nor after it: the last commit's are written back, and what came after it is trained again.
        """
        if self.marks.is_blank:
            log.warning("the marks of the last step are gone; restoring the last checkpoint")
            self.write_back(live)
            return True
        last = self.marks.read()
        if last is None or (last.boot_id != live.boot_id and not last.is_torn):
            return False
        job = self._running(last)
        if not last.is_torn:
            if job is not None and last.ended == job.steps_done + 1:
                self._queue.record_step(job.job_id, last.ended, last.loss)
            return False
        if job is not None:
            self._queue.blame(job.job_id, last.begun)
        note_torn_step(self._board.state)
        if self._config.train.on_torn_step == "accept" and job is not None:
            log.warning(
                "step %d of job %s was cut off; going on with the weights as they are (on_torn_step)",
                *(last.begun, last.job_id),
            )
            make_one(live)
            self.set_version(live, self._board.state.weight_version + 1)
            self._tell_mended(last, job, "accepted")
            self.marks.clear(last.num_steps)
            return False
        log.warning("%s was cut off (step %d); restoring the last checkpoint", last.job_id, last.begun)
        self.write_back(live, lambda: self._tell_mended(last, job, "restored"))
        return True

    def _tell_mended(self, last: LastStep, job: JobInfo | None, outcome: str) -> None:
        """Before the mark is cleared: killed in between, the next trainer mends and tells again."""
        job_id = job.job_id if job else None
        told = {"job_id": job_id, "step": last.begun, "outcome": outcome}
        self._board.tell("step.mended", job_id or "weights", told)

    def write_back(self, live: LiveModel, on_mended: Callable[[], None] = lambda: None) -> None:
        """The last commit's weights into the live ones; jobs that it does not hold are queued again,
        or undone where a restore took them away. A new weight version, not published yet."""
        self.marks.begin_write_back(live.boot_id)
        recover(live.model_dir, disk=self._disk)
        commit = current_commit(live.model_dir)
        copy_shards_into(live, lambda: self._board.show("restoring"))
        self._reconcile(commit)
        version = self._board.state.weight_version + 1
        self.set_version(live, max(version, commit.weight_version) if commit else version)
        on_mended()
        self.marks.clear(num_steps_of(commit))  # last: until here the next trainer does all this again

    def restore_version(self, live: LiveModel, weight_version: int) -> Commit:
        """An older version becomes the newest commit and the live weights. Raises ApolloError with everything
        as it was; or with a torn mark (`marks.is_torn`), and then this trainer must end."""
        before = read_commit(live.model_dir)
        self.marks.begin_write_back(live.boot_id)
        try:
            commit = restore_version(
                live.model_dir,
                weight_version,
                new_version=self._board.state.weight_version + 1,
                applied_seq=self._queue.applied_seq(),
                num_kept=self._config.checkpoint.history,
                disk=self._disk,
            )
        except ApolloError:
            if read_commit(live.model_dir) == before:
                self.marks.clear(self.marks.num_steps)  # no weight was touched, here or on disk
            raise
        self.write_back(live)
        return commit

    def set_version(self, live: LiveModel, version: int) -> None:
        self._board.state.weight_version = version
        write_state(self._config.state_dir, LiveState(str(live.model_dir), live.boot_id, version))

    def _running(self, last: LastStep):
        running = self._queue.list(limit=1, state="running")
        return next((job for job in running if job.job_id.endswith(last.job_id)), None)

    def _knows(self, commit: Commit | None) -> TypeGuard[Commit]:
        """Whether its record of jobs is of this queue's file."""
        return commit is not None and commit.extra.get("queue_id") == self._queue.queue_id

    def _reconcile(self, commit: Commit | None) -> int:
        """The jobs as `commit` has them. Returns how many were queued again."""
        # Without a commit the directory holds none of our jobs, but those called durable were in one that
        # the user has replaced since: they are not trained into the new one unasked.
        durable = self._queue.list(limit=1, state="durable")
        applied_seq, running = (durable[0].seq if durable else 0), {}
        if self._knows(commit):
            applied_seq, running = commit.applied_seq, commit.extra.get("running") or {}
            if (restored := commit.extra.get("restored_from")) is not None:
                held_seq = commit.extra.get("undone_after", applied_seq)
                self._queue.restored(held_seq, applied_seq, restored, commit.weight_version)
        elif commit is not None:
            log.warning("the checkpoint's record of jobs is of another queue file; it is not used")
        changed = self._queue.reconcile(applied_seq, running.get("job_id"), running.get("steps_done", 0))
        num_again = sum(job.state == "queued" for job in changed)
        if num_again:
            jobs = "1 job was" if num_again == 1 else f"{num_again} jobs were"
            log.warning("%s in the lost weights only, not in the checkpoint: training again", jobs)
        return num_again


@torch.no_grad()
def copy_shards_into(live: LiveModel, on_progress: Callable[[], None] = lambda: None) -> None:
    """Writes the shards on disk into the live weights, in place. Recover the directory before."""
    index = shard_index(live.model_dir)
    for name, tensor in live.trained_tensors().items():
        if name in index:
            with safe_open(live.model_dir / index[name].shard, "pt") as shard:
                write(tensor, shard.get_tensor(name))
            on_progress()


def make_one(live: LiveModel) -> None:
    """What several ranks hold becomes the same in each, where a write into them was cut off in between."""
    for tensor in live.trained_tensors().values():
        if isinstance(tensor, Pieced):
            with opened(tensor):
                pass


def num_steps_of(commit: Commit | None) -> int:
    """Steps of the optimizer whose state is in `commit`."""
    return commit.extra.get("optimizer_steps", 0) if commit else 0


def current_commit(model_dir: Path) -> Commit | None:
    """The last commit, or None where there is none or the shards are not the ones that it left any more."""
    commit = read_commit(model_dir)
    if commit is not None and not is_current(model_dir, commit):
        log.warning(
            "%s: the shards were replaced since the commit of weight version %d; its optimizer state and its "
            "record of jobs are not used",
            *(model_dir, commit.weight_version),
        )
        return None
    return commit
