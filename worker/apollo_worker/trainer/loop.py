"""The trainer's main loop: take -> train -> publish -> record, one job at a time, for ever.

It runs in a process of its own. On a CPU this thread is put off while vLLM computes, with the interpreter's
lock in its hand: what must answer in time is in the front (apollo_worker.front.front).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from torch import Tensor

from apollo_ipc.errors import ApolloError, NotReady, UserError
from apollo_ipc.webhooks.tell import tell
from apollo_ipc.wire.messages import SyncCheckpoint
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.queue import Job, JobQueue
from apollo_worker.model.device import is_device_lost
from apollo_worker.process import use_idle_priority
from apollo_worker.step.high_loss import high_loss_notes
from apollo_worker.step.loss_guard import LossGuard, guard_of
from apollo_worker.step.step import Trainer, VllmDied
from apollo_worker.trainer.attachment import Attachment
from apollo_worker.trainer.front_end import TrainerEnd
from apollo_worker.trainer.recovery import Recovery
from apollo_worker.trainer.reference import reference_of
from apollo_worker.trainer.restoring import Restoring
from apollo_worker.trainer.step_marks import StepMarks
from apollo_worker.trainer.sync_policy import Syncing
from apollo_worker.trainer.tally import note_phases, note_step
from apollo_worker.trainer.told_syncs import ToldSyncs

log = logging.getLogger(__name__)
IDLE_WAIT_S = 0.25  # how long the loop sleeps at most before it looks whether vLLM still runs

DEATH_SHOWS_WITHIN_S = 10.0  # 0.1 to 0.3 s a GB of the dead process's memory


class JobStopped(Exception):
    """The job's loop ended before its last step; the reason is the argument."""


class StepFailed(Exception):
    """The cause was raised by the job's own step or by its guard: it ends this job, and no more."""


@contextmanager
def of_the_job() -> Generator[None]:
    try:
        yield
    except Exception as error:
        raise StepFailed from error


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
        self.board.tell = partial(tell, config)
        self.marks = StepMarks(config.state_dir / "step.marks")
        recovery = Recovery(config, self.board, self.queue, self.marks)
        self.attachment = Attachment(config, self.board, recovery, end.tell_model)
        self.syncing = Syncing(
            *(config.checkpoint, self.board, self.queue, self.attachment, self.marks, ToldSyncs(config))
        )
        self.restoring = Restoring(
            *(self.board, self.queue, self.attachment, self.syncing, self.marks),
            announce=lambda: self.announce(),
            has_changed=self._has_changed,
        )
        self._published_at = time.monotonic()
        self._num_unpublished = 0  # steps since the last weight version

    def run(self) -> None:
        """Until `board.stopping` is set. What raises here leaves what a kill at the same place would leave:
        nothing is synced, and the next trainer brings weights, jobs and marks to one state."""
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
        except BaseException:
            self.attachment.detach("the trainer has ended")
            raise
        self.stop()

    def train(self, job: Job) -> None:
        """One job from its first step not done to its end. What its own steps and their guard raise ends this
        job only; anything else (a full disk, the queue's file) ends the trainer, and the next one goes on."""
        try:
            self.train_to_the_end(job)
        except Exception:
            # The job is not to blame for what ends this trainer, unless one of its steps is open.
            if not self.marks.is_torn:
                with suppress(ApolloError, sqlite3.Error):  # what fails may be just that
                    self.queue.release(job.info.job_id)
            raise

    def train_to_the_end(self, job: Job) -> None:
        try:
            self.train_steps(job)
            version = self.publish() if job.plan.num_steps else self.board.state.weight_version
            self.queue.finish(job.info.job_id, "applied", weight_version=version)
        except JobStopped as stopped:
            self.end_early(job, str(stopped))
        except Exception as error:
            own = error.__cause__ if isinstance(error, StepFailed) else None
            is_lost = is_device_lost(own or error)
            if self.is_end_of_vllm(own or error, is_lost):
                # The job stays the running one, for a fresh process: a cut-off backward leaves memory to C++.
                why = str(error)  # whoever keeps the record would keep the weights mapped by its traceback
                log.warning("job %s waits for the next vLLM and a new trainer (%s)", job.info.job_id, why)
                self.queue.release(job.info.job_id)
                self.board.stopping.set()
                return
            if not isinstance(own, Exception):
                raise
            if is_lost:
                # The CUDA context is beyond use: every job after this one would fail of it too. The next
                # trainer finds the torn step, and the third time its job is quarantined.
                raise own from None
            self.fail(job, own)
        else:
            self.syncing.note_job_done(job.plan.num_steps)
            self.forget_old_plans()

    def is_end_of_vllm(self, error: BaseException, is_lost: bool) -> bool:
        """On a GPU it may also show as an error of CUDA, before the kernel has torn down its memory and says
        that it has ended."""
        live, wait_s = self.attachment.live, DEATH_SHOWS_WITHIN_S if is_lost else 0.0
        return isinstance(error, VllmDied) or live is None or live.has_ended(wait_s)

    def fail(self, job: Job, error: Exception) -> None:
        """Ends the job. A step that was cut off by the error is undone with the whole recovery of a crash."""
        log.error("job %s failed", job.info.job_id, exc_info=error)
        message = error.message if isinstance(error, ApolloError) else f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        is_spike = isinstance(error, UserError) and error.code == "loss_spike"
        is_going_back = is_spike and self.config.train.on_spike == "restore"
        if is_going_back:
            self.syncing.wait()
            self.marks.begin_write_back(self.attachment.require_live().boot_id)  # harmed, whatever comes
        self.queue.finish(job.info.job_id, "failed", error=message, traceback=trace)
        if is_going_back:
            self.attachment.write_back()
            self.announce()
        elif self.attachment.undo_torn_step():
            self.announce()
        else:
            self.publish()

    def train_steps(self, job: Job) -> None:
        """Raises JobStopped (cancel, stop of the worker), StepFailed (VllmDied, or UserError after too many
        bad steps), and what else goes wrong."""
        live, trainer = self.attachment.require_live(), self.attachment.trainer
        job_id, todo = job.info.job_id, job.plan
        assert trainer is not None
        with of_the_job():
            trainer.use_rank(todo.rank)
            notes = trainer.prepare_accumulation(todo)
        self.queue.add_notes(job_id, notes)
        num_steps, loss = todo.num_steps, None

        def show(steps_done: int) -> None:
            self.board.show("training", job_id=job_id, steps_done=steps_done, num_steps=num_steps, loss=loss)

        show(job.info.steps_done)
        guard = self.guard_of(job, trainer)

        def measured(examples: Sequence[TokenisedExample]) -> list[Tensor]:
            self.between_steps(job_id, guard)
            show(job.info.steps_done)
            with of_the_job():
                return trainer.logprobs_of(examples)

        reference = reference_of(self.queue, job, measured)
        last_losses: dict[int, float] = {}  # by the update's place in its epoch
        for step in range(job.info.steps_done, num_steps):
            self.between_steps(job_id, guard)
            self.marks.begin(live.boot_id, job_id, step + 1)
            examples, started = todo.examples_of(step), time.perf_counter()
            with of_the_job():
                result = trainer.step_on(
                    examples,
                    todo.learning_rate(step),
                    todo.weight_decay,
                    partial(show, step),
                    is_mean=todo.is_mean,
                    objective=todo.objective,
                    reference=[reference[i] for i in todo.rows_of(step)] if reference else None,
                    adam=todo.adam,
                    embeddings=todo.embeddings,
                )
            loss, step_s = result.loss, time.perf_counter() - started
            is_counted = trainer.optimizer is trainer.main_optimizer
            self.marks.end(live.boot_id, job_id, step + 1, loss, is_counted=is_counted)
            self.queue.record_step(job_id, step + 1, loss)
            record_s = time.perf_counter() - started - step_s
            note_step(self.board.state, examples, result, step_s, record_s)
            self._num_unpublished += 1
            show(step + 1)
            with of_the_job():
                guard.look(step + 1, loss, is_written=not result.is_bad)
            last_losses[step % todo.steps_of_epoch] = loss
        check(guard)
        with of_the_job():
            notes = high_loss_notes(trainer, todo, last_losses)
        self.queue.add_notes(job_id, notes)

    def guard_of(self, job: Job, trainer: Trainer) -> LossGuard:
        """Its references are noted before the job's first step, and are there again when it is resumed."""
        job_id, first_loss = job.info.job_id, job.info.loss_first if job.info.steps_done else None
        first_losses, text_loss = self.queue.losses_before(job_id)
        with of_the_job():
            guard = guard_of(
                trainer, job.plan, first_losses=first_losses, text_loss=text_loss, first_loss=first_loss
            )
        if guard.before.text is not None and text_loss is None:
            self.queue.note_text_loss(job_id, guard.before.text)
        return guard

    def between_steps(self, job_id: str, guard: LossGuard) -> None:
        """What may happen while no step is in the making. Weights that are kept were looked at before."""
        if reason := self.reason_to_stop(job_id):
            check(guard)
            raise JobStopped(reason)
        self.do_what_is_asked(guard)
        since_s = time.monotonic() - self._published_at
        if self._num_unpublished and since_s >= self.config.train.publish_interval_s:
            self.publish()

    def reason_to_stop(self, job_id: str) -> str | None:
        if self.board.stopping.is_set():
            return "stopping"
        if self.queue.is_cancel_requested(job_id):
            return "cancelled"
        return "paused" if self.queue.is_paused(job_id) else None

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
        version, started = self.board.state.weight_version, time.perf_counter()
        if not self.front_end.publish(version):
            log.info("weight version %d: no router has confirmed yet", version)
        note_phases(self.board.state, publish=time.perf_counter() - started)
        self._published_at, self._num_unpublished = time.monotonic(), 0

    # --- what may happen between two steps ---

    def do_what_is_asked(self, guard: LossGuard | None = None) -> None:
        """Starts a sync that is asked for or due; restores an older version, while no job trains. guard: of
        the job that trains; StepFailed where weights would be synced that the job has harmed."""
        while not self.board.asked.empty():
            asked = self.board.asked.get()
            if isinstance(asked.request, SyncCheckpoint):
                self.syncing.ask(asked)
            else:
                self.restoring.answer(asked, is_training=guard is not None)
        if self.syncing.is_wanted(self._has_changed()):
            if guard is not None:
                check(guard)
            if self._num_unpublished:
                self.publish()  # two checkpoints with different weights have different versions
            with suppress(ApolloError):  # noted in the status, and told to those who asked
                self.syncing.start(self.syncing.kind())

    def forget_old_plans(self) -> None:
        self.queue.forget_plans(time.time() - self.config.worker.keep_examples_s)

    def _has_changed(self) -> bool:
        state = self.board.state
        return self._num_unpublished > 0 or state.weight_version != state.durable_version

    def wait(self, activity: str) -> None:
        self.board.show(activity)
        while not self.board.asked.empty() and self.attachment.live is None:
            reason = self.board.state.attach_error or "not attached to vLLM"
            self.board.asked.get().done.set_exception(NotReady(reason))
        self.board.wake.wait(IDLE_WAIT_S)
        self.board.wake.clear()

    def stop(self) -> None:
        """Syncs what changed, lets go of the weights. Without a front the next trainer waits: no sync."""
        live = self.attachment.live
        if live is None or not live.is_alive():
            self.attachment.let_go("vLLM has ended")
        # It is set at the end of an attach: weights that were not yet mended are not synced.
        is_attached = self.board.state.attached and not self.marks.is_torn
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


def check(guard: LossGuard) -> None:
    """Before weights are kept that the job has trained. Raises StepFailed."""
    with of_the_job():
        guard.check()
