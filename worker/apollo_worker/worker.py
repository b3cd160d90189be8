"""The trainer's main loop: take -> tokenise -> train -> publish -> record, one job at a time, for ever.

It runs in a process of its own. On a CPU this thread is put off while vLLM computes, with the interpreter's
lock in its hand: what must answer in time is in the front (apollo_worker.front).
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from functools import partial

import torch

from apollo_ipc.checkpoint import read_commit
from apollo_ipc.errors import ApolloError, CheckpointError, NotReady, UserError
from apollo_ipc.messages import SyncResult
from apollo_worker.attachment import Attachment
from apollo_worker.job_run import Plan, TrainerQueue, plan
from apollo_worker.marks import StepMarks
from apollo_worker.priority import use_idle_priority
from apollo_worker.queue import Job
from apollo_worker.trainer import VllmDied
from apollo_worker.trainer_end import TrainerEnd

log = logging.getLogger(__name__)
IDLE_WAIT_S = 0.25  # how long the loop sleeps at most before it looks whether vLLM still runs


class JobStopped(Exception):
    """The job's loop ended before its last step; the reason is the argument."""


def is_device_lost(error: Exception) -> bool:
    """An error of the accelerator that stays: any but running out of memory."""
    is_accelerator = isinstance(error, torch.AcceleratorError)
    return is_accelerator and not isinstance(error, torch.OutOfMemoryError)


class TrainingWorker:
    def __init__(self, end: TrainerEnd):
        self.config = config = end.config
        self.front, self.shared = end, end.shared
        # The front answers clients and never holds the file for long; a job must not fail on it.
        busy_timeout_s = config.worker.step_timeout_s
        self.queue = TrainerQueue(
            config.state_dir / "queue.sqlite", config.worker.max_queued_jobs, busy_timeout_s
        )
        self.queue.on_change = end.on_change
        self.marks = StepMarks(config.state_dir / "step.marks")
        self.attachment = Attachment(config, self.shared, self.queue, self.marks, end.tell_model)
        self._synced_at = self._published_at = time.monotonic()
        self._is_bulk_done = False  # a bulk job has ended since the last sync

    def run(self) -> None:
        """Until `shared.stopping` is set."""
        use_idle_priority(self.config)  # before OpenMP's threads are born, which inherit it
        try:
            while not self.shared.stopping.is_set():
                if not self.attachment.ensure():
                    self.wait("waiting for vLLM")
                    continue
                self.sync_if_asked_or_due()
                if (job := self.queue.take()) is None:
                    self.wait("idle")
                    continue
                self.train(job)
        finally:
            self.stop()

    def train(self, job: Job) -> None:
        """One job from its first step not done to its end. What goes wrong in it ends this job only."""
        try:
            todo = self.tokenise(job)
            self.train_steps(job, todo)
            version = self.publish() if todo.num_steps else self.shared.weight_version
            self.queue.remember_examples(job.info.job_id, todo.hashes_of(todo.num_steps))
            self.queue.finish(job.info.job_id, "applied", weight_version=version)
        except JobStopped as stopped:
            self.end_early(job, str(stopped))
        except Exception as error:
            live = self.attachment.live
            if isinstance(error, VllmDied) or live is None or not live.is_alive():
                # On a GPU the end of vLLM may also show as an error of CUDA. The job stays the running one,
                # and a fresh process takes it on: a backward pass that was cut off leaves memory to C++.
                log.warning("job %s waits for the next vLLM and a new trainer (%s)", job.info.job_id, error)
                self.queue.release(job.info.job_id)
                self.shared.stopping.set()
                return
            if is_device_lost(error):
                # The CUDA context is beyond use: every job after this one would fail of it too. The next
                # trainer finds the torn step; a job that does this three times is quarantined.
                self.shared.attached = False  # nothing of this is synced
                raise
            self.fail(job, error)
        else:
            checkpoint = self.config.checkpoint
            self._is_bulk_done |= (
                checkpoint.sync_after_bulk_job and todo.num_steps >= checkpoint.bulk_job_steps
            )

    def fail(self, job: Job, error: Exception) -> None:
        """Ends the job. A step that was cut off by the error is undone with the whole recovery of a crash."""
        log.exception("job %s failed", job.info.job_id)
        message = error.message if isinstance(error, ApolloError) else f"{type(error).__name__}: {error}"
        self.queue.finish(job.info.job_id, "failed", error=message, traceback=traceback.format_exc())
        self.attachment.undo_torn_step()
        self.publish()

    def tokenise(self, job: Job) -> Plan:
        assert self.attachment.tokeniser is not None
        self.shared.show("tokenising", job_id=job.info.job_id)
        return plan(job.request, self.attachment.tokeniser, self.queue, self.config.train)

    def train_steps(self, job: Job, todo: Plan) -> None:
        """Raises JobStopped (cancel, stop of the worker), VllmDied, or UserError after too many bad steps."""
        live, trainer, job_id = self.attachment.live, self.attachment.trainer, job.info.job_id
        assert live is not None
        assert trainer is not None
        trainer.use_rank(job.request.options.rank)
        if todo.num_steps:
            self.queue.add_notes(job_id, trainer.prepare_accumulation(todo.accumulate_steps))
        num_bad, num_steps, loss = 0, todo.num_steps, None

        def show(steps_done: int) -> None:
            self.shared.show("training", job_id=job_id, steps_done=steps_done, num_steps=num_steps, loss=loss)

        show(job.info.steps_done)
        for step in range(job.info.steps_done, num_steps):
            self.between_steps(job_id)
            self.marks.begin(live.boot_id, job_id, step + 1)
            result = trainer.step_on(
                todo.examples_of(step), todo.learning_rate(step), todo.weight_decay, partial(show, step)
            )
            loss = result.loss
            self.marks.end(live.boot_id, job_id, step + 1, loss)
            self.queue.record_step(job_id, step + 1, loss)
            show(step + 1)
            num_bad = num_bad + 1 if result.is_bad else 0
            if num_bad >= self.config.train.max_bad_steps:
                raise UserError(
                    f"{num_bad} steps in a row gave a loss or gradient that is not finite (last loss "
                    f"{loss}); nothing of them was written. A smaller lr may help",
                    code="not_finite",
                )

    def between_steps(self, job_id: str) -> None:
        """What may happen while no step is in the making."""
        if self.shared.stopping.is_set():
            raise JobStopped("stopping")
        if self.queue.is_cancel_requested(job_id):
            raise JobStopped("cancelled")
        self.sync_if_asked_or_due()
        if time.monotonic() - self._published_at >= self.config.train.publish_interval_s:
            self.publish()

    def end_early(self, job: Job, reason: str) -> None:
        if reason == "cancelled":
            version = self.publish()
            self.queue.finish(
                job.info.job_id,
                "cancelled",
                weight_version=version,
                notes=["steps already done stay in the weights"],
            )
        else:
            self.queue.release(job.info.job_id)  # the next worker goes on with it

    def publish(self) -> int:
        """A new weight version: routers drop the KV that older weights computed. Returns the version."""
        self.attachment.set_version(self.shared.weight_version + 1)
        version = self.shared.weight_version
        if not self.front.publish(version):
            log.info("weight version %d: no router has confirmed yet", version)
        self._published_at = time.monotonic()
        return version

    def sync_if_asked_or_due(self) -> None:
        """One sync for every waiting `POST /checkpoint`; else by the clock while something changed."""
        waiting = []
        while not self.shared.sync_requests.empty():
            waiting.append(self.shared.sync_requests.get())
        interval = self.config.checkpoint.sync_interval_s
        is_due = interval > 0 and time.monotonic() - self._synced_at >= interval and self._has_changed()
        is_due, self._is_bulk_done = is_due or self._is_bulk_done, False
        if not waiting and not is_due:
            return
        try:
            result = self.sync()
        except ApolloError as error:
            for future in waiting:
                future.set_exception(error)
        else:
            for future in waiting:
                future.set_result(result)

    def _has_changed(self) -> bool:
        return self.shared.weight_version != self.shared.durable_version or self._running() is not None

    def sync(self) -> SyncResult:
        """Live weights, optimizer state and what they hold, as one commit. Raises CheckpointError."""
        attached = self.attachment
        if attached.live is None or not attached.live.is_alive():
            raise NotReady("not attached to vLLM: there are no live weights to sync")
        assert attached.writer is not None
        assert attached.trainer is not None
        self.shared.show("syncing")
        self._synced_at = time.monotonic()  # a failing disk is tried again by the clock, not at every step
        optimizer, model_dir = attached.trainer.main_optimizer, attached.live.model_dir
        before = read_commit(model_dir)
        applied_seq = self.queue.applied_seq()
        try:
            result = attached.writer.sync(
                weight_version=self.shared.weight_version,
                applied_seq=applied_seq,
                optimizer=(optimizer.state_tensors(), optimizer.state_meta()),
                extra={"running": self._running(), "queue_id": self.queue.queue_id},
            )
        except CheckpointError as error:
            log.error("sync failed: %s", error.message)
            self.shared.sync_error = error.message
            # What failed may have come after the rename that commits: then the commit stands.
            if (commit := read_commit(model_dir)) is not None and commit != before:
                self.queue.mark_durable(commit.applied_seq)
                self.shared.durable_version = commit.weight_version
            raise
        self.queue.mark_durable(applied_seq)
        self.shared.last_sync, self.shared.sync_error = result, None
        self.shared.durable_version = result.weight_version
        log.info("synced weight version %d: %d bytes", result.weight_version, result.bytes_written)
        return result

    def _running(self) -> dict | None:
        """The job that is half done, as the commit record keeps it."""
        running = self.queue.list(limit=1, state="running")
        if not running or not running[0].steps_done:
            return None
        return {"job_id": running[0].job_id, "steps_done": running[0].steps_done}

    def wait(self, activity: str) -> None:
        self.shared.show(activity)
        while not self.shared.sync_requests.empty() and self.attachment.live is None:
            reason = self.shared.attach_error or "not attached to vLLM"
            self.shared.sync_requests.get().set_exception(NotReady(reason))
        self.shared.wake.wait(IDLE_WAIT_S)
        self.shared.wake.clear()

    def stop(self) -> None:
        """Syncs what changed, lets go of the weights. Without a front the next trainer waits: no sync."""
        # `shared.attached` is set at the end of an attach: weights that were not yet mended are not synced.
        live = self.attachment.live
        is_attached = self.shared.attached and live is not None and live.is_alive()
        is_wanted = self.config.checkpoint.sync_at_stop and self.front.has_front
        try:
            if is_attached and is_wanted and self._has_changed():
                self.sync()
        except ApolloError as error:
            log.error("the last sync failed, the checkpoint stays at version %d: %s",
                      self.shared.durable_version, error.message)  # fmt: skip
        self.attachment.detach("the worker is stopping")
        self.queue.close()
        self.marks.close()
        log.info("trainer %d stopped", os.getpid())
