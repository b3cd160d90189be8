"""The trainer's main loop: take -> train -> publish -> record, one job at a time, for ever.

It runs in a process of its own. On a CPU this thread is put off while vLLM computes, with the interpreter's
lock in its hand: what must answer in time is in the front (apollo_worker.front.front).
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from contextlib import suppress
from functools import partial

from apollo_ipc.checkpoint import history, read_commit
from apollo_ipc.errors import ApolloError, CheckpointError, Conflict, NotReady, UserError
from apollo_ipc.wire.messages import RestoreVersion, SyncCheckpoint
from apollo_ipc.wire.replies import RestoreResult
from apollo_worker.jobs.queue import Job, JobQueue
from apollo_worker.link.status_board import Asked
from apollo_worker.model.device import is_device_lost
from apollo_worker.process import use_idle_priority
from apollo_worker.step.loss_guard import LossGuard, guard_of
from apollo_worker.step.step import Trainer, VllmDied
from apollo_worker.trainer.attachment import Attachment
from apollo_worker.trainer.front_end import TrainerEnd
from apollo_worker.trainer.recovery import Recovery
from apollo_worker.trainer.step_marks import StepMarks
from apollo_worker.trainer.sync_policy import Syncing

log = logging.getLogger(__name__)
IDLE_WAIT_S = 0.25  # how long the loop sleeps at most before it looks whether vLLM still runs

DEATH_SHOWS_WITHIN_S = 10.0  # 0.1 to 0.3 s a GB of the dead process's memory


class JobStopped(Exception):
    """The job's loop ended before its last step; the reason is the argument."""


class MainLoop:
    def __init__(self, end: TrainerEnd):
        self.config = config = end.config
        self.front_end, self.board = end, end.board
        # The front answers clients and never holds the file for long; a job must not fail on it.
        busy_timeout_s = config.worker.step_timeout_s
        self.queue = JobQueue(
            config.state_dir / "queue.sqlite", config.worker.max_queued_jobs, busy_timeout_s
        )
        self.queue.on_change = end.on_change
        self.marks = StepMarks(config.state_dir / "step.marks")
        recovery = Recovery(config, self.board, self.queue, self.marks)
        self.attachment = Attachment(config, self.board, recovery, end.tell_model)
        self.syncing = Syncing(config.checkpoint, self.board, self.queue, self.attachment, self.marks)
        self._published_at = time.monotonic()
        self._num_unpublished = 0  # steps since the last weight version

    def run(self) -> None:
        """Until `board.stopping` is set."""
        use_idle_priority(self.config)  # before OpenMP's threads are born, which inherit it
        try:
            while not self.board.stopping.is_set():
                if not self.attachment.ensure():
                    self.wait("waiting for vLLM")
                    continue
                self.do_what_is_asked()
                if (job := self.queue.take()) is None:
                    self.wait("paused" if self.queue.is_paused() else "idle")
                    continue
                self.train(job)
        finally:
            self.stop()

    def train(self, job: Job) -> None:
        """One job from its first step not done to its end. What goes wrong in it ends this job only."""
        try:
            self.train_steps(job)
            version = self.publish() if job.plan.num_steps else self.board.state.weight_version
            self.queue.finish(job.info.job_id, "applied", weight_version=version)
        except JobStopped as stopped:
            self.end_early(job, str(stopped))
        except Exception as error:
            live, is_lost = self.attachment.live, is_device_lost(error)
            wait_s = DEATH_SHOWS_WITHIN_S if is_lost else 0.0
            if isinstance(error, VllmDied) or live is None or live.has_ended(wait_s):
                # On a GPU the end of vLLM may also show as an error of CUDA, before the kernel has torn down
                # its memory and says that it has ended. The job stays the running one, and a fresh process
                # takes it on: a backward pass that was cut off leaves memory to C++.
                log.warning("job %s waits for the next vLLM and a new trainer (%s)", job.info.job_id, error)
                self.queue.release(job.info.job_id)
                self.board.stopping.set()
                return
            if is_lost:
                # The CUDA context is beyond use: every job after this one would fail of it too. The next
                # trainer finds the torn step; a job that does this three times is quarantined.
                self.board.state.attached = False  # nothing of this is synced
                raise
            self.fail(job, error)
        else:
            self.syncing.note_job_done(job.plan.num_steps)
            self.forget_old_plans()

    def fail(self, job: Job, error: Exception) -> None:
        """Ends the job. A step that was cut off by the error is undone with the whole recovery of a crash."""
        log.exception("job %s failed", job.info.job_id)
        message = error.message if isinstance(error, ApolloError) else f"{type(error).__name__}: {error}"
        is_spike = isinstance(error, UserError) and error.code == "loss_spike"
        is_going_back = is_spike and self.config.train.on_spike == "restore"
        if is_going_back:
            self.syncing.wait()
            self.marks.begin_write_back(self.attachment.require_live().boot_id)  # harmed, whatever comes
        self.queue.finish(job.info.job_id, "failed", error=message, traceback=traceback.format_exc())
        if is_going_back:
            self.attachment.write_back()
            self.announce()
        elif self.attachment.undo_torn_step():
            self.announce()
        else:
            self.publish()

    def train_steps(self, job: Job) -> None:
        """Raises JobStopped (cancel, stop of the worker), VllmDied, or UserError after too many bad steps."""
        live, trainer = self.attachment.require_live(), self.attachment.trainer
        job_id, todo = job.info.job_id, job.plan
        assert trainer is not None
        trainer.use_rank(todo.rank)
        if todo.num_steps:
            self.queue.add_notes(job_id, trainer.prepare_accumulation(todo.accumulate_steps))
        num_steps, loss = todo.num_steps, None

        def show(steps_done: int) -> None:
            self.board.show("training", job_id=job_id, steps_done=steps_done, num_steps=num_steps, loss=loss)

        show(job.info.steps_done)
        guard = self.guard_of(job, trainer)
        for step in range(job.info.steps_done, num_steps):
            self.between_steps(job_id, guard)
            self.marks.begin(live.boot_id, job_id, step + 1)
            result = trainer.step_on(
                todo.examples_of(step),
                todo.learning_rate(step),
                todo.weight_decay,
                partial(show, step),
                is_mean=todo.is_mean,
            )
            loss = result.loss
            is_counted = trainer.optimizer is trainer.main_optimizer
            self.marks.end(live.boot_id, job_id, step + 1, loss, is_counted=is_counted)
            self.queue.record_step(job_id, step + 1, loss)
            self._num_unpublished += 1
            show(step + 1)
            guard.look(step + 1, loss, is_written=not result.is_bad)
        guard.check()

    def guard_of(self, job: Job, trainer: Trainer) -> LossGuard:
        """Its references are noted before the job's first step, and are there again when it is resumed."""
        job_id, first_loss = job.info.job_id, job.info.loss_first if job.info.steps_done else None
        first_losses, text_loss = self.queue.losses_before(job_id)
        guard = guard_of(
            trainer, job.plan, first_losses=first_losses, text_loss=text_loss, first_loss=first_loss
        )
        if guard.before.text is not None and text_loss is None:
            self.queue.note_text_loss(job_id, guard.before.text)
        return guard

    def between_steps(self, job_id: str, guard: LossGuard) -> None:
        """What may happen while no step is in the making. Weights that are kept were looked at before."""
        if self.board.stopping.is_set():
            guard.check()
            raise JobStopped("stopping")
        if self.queue.is_cancel_requested(job_id):
            guard.check()
            raise JobStopped("cancelled")
        if self.queue.is_paused(job_id):
            guard.check()
            raise JobStopped("paused")
        self.do_what_is_asked(guard)
        since_s = time.monotonic() - self._published_at
        if self._num_unpublished and since_s >= self.config.train.publish_interval_s:
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
            if reason == "paused" and self._num_unpublished:
                self.publish()  # what was trained so far is served meanwhile
            self.queue.release(job.info.job_id)  # goes on with it: the next worker, or this one once resumed

    def publish(self) -> int:
        """A new weight version: routers drop the KV that older weights computed. Returns the version."""
        self.marks.check_whole()
        version = self.board.state.weight_version + 1
        self.attachment.recovery.set_version(self.attachment.require_live(), version)
        self.announce()
        return version

    def announce(self) -> None:
        """The version as it is, which a write-back has raised already."""
        version = self.board.state.weight_version
        if not self.front_end.publish(version):
            log.info("weight version %d: no router has confirmed yet", version)
        self._published_at, self._num_unpublished = time.monotonic(), 0

    # --- what may happen between two steps ---

    def do_what_is_asked(self, guard: LossGuard | None = None) -> None:
        """Starts a sync that is asked for or due; restores an older version, while no job trains. guard: of
        the job that trains; it raises UserError where weights would be synced that the job has harmed."""
        while not self.board.asked.empty():
            asked = self.board.asked.get()
            if isinstance(asked.request, SyncCheckpoint):
                self.syncing.ask(asked)
            else:
                self.answer_restore(asked, is_training=guard is not None)
        if self.syncing.is_wanted(self._has_changed()):
            if guard is not None:
                guard.check()
            if self._num_unpublished:
                self.publish()  # two checkpoints with different weights have different versions
            with suppress(ApolloError):  # noted in the status, and told to those who asked
                self.syncing.start(self.syncing.kind())

    def answer_restore(self, asked: Asked, *, is_training: bool) -> None:
        assert isinstance(asked.request, RestoreVersion)
        try:
            if is_training or self.queue.count("running"):  # a paused one has begun, too
                error = Conflict(
                    "a job is being trained or paused; wait for its end or cancel it", code="job_running"
                )
                error.http_status = 409
                raise error
            asked.done.set_result(self.restore_version(asked.request.weight_version))
        except BaseException as error:
            log.warning("restoring version %d: %s", asked.request.weight_version, error)
            reply = (
                error if isinstance(error, ApolloError) else CheckpointError(f"the restore failed: {error}")
            )
            asked.done.set_exception(reply)
            if self.marks.is_torn or not isinstance(error, ApolloError):
                raise  # the next trainer mends

    def restore_version(self, weight_version: int) -> RestoreResult:
        """Writes an older version back: on disk as a new commit, then into the live weights.

        The present state is synced first where it can be, so that this step back can be undone.
        """
        live, started = self.attachment.require_live(), time.monotonic()
        before = read_commit(live.model_dir)
        if before is None:
            raise UserError("nothing was synced yet, so there is no older version", field="VERSION")
        history.find(before, weight_version)
        log.warning(
            "restoring weight version %d; now it is %d", weight_version, self.board.state.weight_version
        )
        if self._has_changed():
            self.sync_before_restore()
        self.syncing.wait()
        self.board.show("restoring")
        num_undone = self.queue.count("undone")
        commit = self.attachment.restore_version(weight_version)
        self.announce()
        num_undone = self.queue.count("undone") - num_undone
        new_version = self.board.state.weight_version
        # What a sync said of the weights that are gone (NaN, for one) is over with them.
        self.board.state.durable_version, self.board.state.sync_error = new_version, None
        log.warning(
            "weight version %d restored as %d; %d jobs undone", weight_version, new_version, num_undone
        )
        return RestoreResult(
            restored_version=weight_version,
            weight_version=new_version,
            num_tensors_changed=sum(before.tensors.get(n) != d for n, d in commit.tensors.items()),
            num_jobs_undone=num_undone,
            has_optimizer=commit.optimizer is not None,
            duration_s=time.monotonic() - started,
        )

    def sync_before_restore(self) -> None:
        try:
            self.syncing.start("delta")
            self.syncing.wait()
        except ApolloError as error:
            # Weights that no sync takes (NaN) are what a restore is for.
            log.warning("the present weights are not kept, since they cannot be synced: %s", error.message)

    def forget_old_plans(self) -> None:
        self.queue.forget_plans(time.time() - self.config.worker.keep_examples_s)

    def _has_changed(self) -> bool:
        return (
            self._num_unpublished > 0 or self.board.state.weight_version != self.board.state.durable_version
        )

    def wait(self, activity: str) -> None:
        self.board.show(activity)
        while not self.board.asked.empty() and self.attachment.live is None:
            reason = self.board.state.attach_error or "not attached to vLLM"
            self.board.asked.get().done.set_exception(NotReady(reason))
        self.board.wake.wait(IDLE_WAIT_S)
        self.board.wake.clear()

    def stop(self) -> None:
        """Syncs what changed, lets go of the weights. Without a front the next trainer waits: no sync."""
        # It is set at the end of an attach: weights that were not yet mended are not synced.
        live = self.attachment.live
        is_attached = (
            self.board.state.attached and live is not None and live.is_alive() and not self.marks.is_torn
        )
        is_wanted = self.config.checkpoint.sync_at_stop and self.front_end.has_front
        try:
            if is_attached and is_wanted:
                self.syncing.sync_at_stop(self._has_changed())
            else:
                self.syncing.wait()
        except ApolloError as error:
            log.error("the last sync failed, the checkpoint stays at version %d: %s",
                      self.board.state.durable_version, error.message)  # fmt: skip
        self.syncing.refuse_waiting(
            NotReady("the worker is stopping; send the request again", code="stopping")
        )
        self.attachment.detach("the worker is stopping")
        self.queue.close()
        self.marks.close()
        log.info("trainer %d stopped", os.getpid())
