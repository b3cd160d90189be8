"""When the checkpoint is written, of which kind, and who is told: the trainer's main loop calls it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from pathlib import Path

import msgspec

from apollo_ipc.checkpoint import Commit, recover
from apollo_ipc.checkpoint.disk import WatchedDisk
from apollo_ipc.checkpoint.record import read_commit
from apollo_ipc.config import Checkpoint
from apollo_ipc.errors import ApolloError, CheckpointError, NotReady
from apollo_ipc.wire.messages import SyncCheckpoint
from apollo_ipc.wire.requests import SyncKind
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import PendingRequest, StatusBoard
from apollo_worker.sync.sync_task import RunningSync
from apollo_worker.trainer.attachment import Attachment
from apollo_worker.trainer.step_marks import StepMarks
from apollo_worker.trainer.tally import note_failed_sync, note_sync
from apollo_worker.trainer.told_syncs import ToldSyncs

log = logging.getLogger(__name__)
# A delta that takes so much of the bytes that it stands for is no better than the shards themselves.
MAX_DELTA_FRACTION = 0.5


class InProgress(msgspec.Struct, frozen=True):
    """A sync that is being written while training goes on."""

    running: RunningSync
    model_dir: Path
    before: Commit | None
    applied_seq: int
    waiting: list[Future]


class Syncing:
    """Clocks start anew with the process: nothing is lost by a sync that comes later than it might."""

    def __init__(
        self,
        config: Checkpoint,
        board: StatusBoard,
        queue: JobQueue,
        attachment: Attachment,
        marks: StepMarks,
        told: ToldSyncs,
    ):
        self._config, self._board, self._queue = config, board, queue
        self._attachment, self._marks, self._told = attachment, marks, told
        self._synced_at = self._full_at = time.monotonic()
        self._is_bulk_done = False  # a bulk job has ended since the last sync
        self._is_delta_large = False
        self._in_progress: InProgress | None = None
        self._waiting: list[PendingRequest] = []  # for a sync that begins after they have asked

    def note_job_done(self, num_steps: int) -> None:
        self._is_bulk_done |= self._config.sync_after_bulk_job and num_steps >= self._config.bulk_job_steps

    def ask(self, asked: PendingRequest) -> None:
        self._waiting.append(asked)

    def is_wanted(self, has_changed: bool) -> bool:
        """Whether `start` should be called: someone asks, a bulk job has ended, or it is time."""
        self.look()
        if self._in_progress is not None:
            return False
        interval = self._config.sync_interval_s
        is_due = interval > 0 and time.monotonic() - self._synced_at >= interval and has_changed
        return bool(self._waiting) or self._is_bulk_done or is_due

    def kind(self) -> SyncKind:
        """Of the sync that is wanted now."""
        asked = [a.request.kind for a in self._waiting if isinstance(a.request, SyncCheckpoint)]
        is_full_due = time.monotonic() - self._full_at >= self._config.full_interval_s
        if "full" in asked or self._is_bulk_done or is_full_due or self._is_delta_large:
            return "full"
        return "delta"

    def start(self, kind: SyncKind, *, num_kept: int = 0) -> None:
        """Copies out what changed; the writing goes on beside training, and `look` sees its end.

        num_kept: as many older versions stay restorable at least, beyond checkpoint.history.
        Raises CheckpointError, NotReady; those who asked are told too.
        """
        waiting, self._waiting = [asked.done for asked in self._waiting], []
        self._is_bulk_done = False
        self._synced_at = time.monotonic()  # a failing disk is tried again by the clock, not at every step
        try:
            self._start(kind, waiting, num_kept)
        except ApolloError as error:
            self._note_failure(error)
            for done in waiting:
                done.set_exception(error)
            raise

    def _start(self, kind: SyncKind, waiting: list[Future], num_kept: int) -> None:
        self.wait()
        attached, board = self._attachment, self._board
        live, writer, trainer = attached.live, attached.writer, attached.trainer
        state = board.state
        self._told.begin(live.model_dir if live else None, state.weight_version, state.durable_version)
        self._marks.check_whole()
        if live is None or not live.is_alive():
            raise NotReady("not attached to vLLM: there are no live weights to sync")
        assert writer is not None
        assert trainer is not None

        def check_live() -> None:
            # Under the lock: a vLLM that loads this directory holds it, so none has come in between.
            if not live.is_alive():
                raise NotReady("vLLM has ended before its weights could be synced")

        board.show("syncing")
        optimizer = trainer.main_optimizer
        before, applied_seq = read_commit(live.model_dir), self._queue.applied_seq()
        try:
            running = writer.start(
                kind,
                weight_version=board.state.weight_version,
                applied_seq=applied_seq,
                optimizer=(optimizer.state_tensors(), optimizer.state_meta()),
                extra={
                    "running": running_job(self._queue),
                    "queue_id": self._queue.queue_id,
                    "optimizer_steps": self._marks.num_steps,
                },
                check_live=check_live,
                on_progress=lambda: board.show("syncing"),
                num_kept=num_kept,
            )
        except CheckpointError:
            self._note_commit(live.model_dir, before)
            raise
        self._in_progress = InProgress(running, live.model_dir, before, applied_seq, waiting)
        board.state.is_syncing = True
        board.show("syncing")

    def look(self) -> None:
        """Takes notice of a sync that has ended."""
        if self._in_progress is None or not self._in_progress.running.committed.done():
            return
        ended, self._in_progress = self._in_progress, None
        board = self._board
        board.state.is_syncing = False
        if error := ended.running.committed.exception():
            if not isinstance(error, ApolloError):
                log.error("sync failed", exc_info=error)
                error = CheckpointError(f"the sync failed: {type(error).__name__}: {error}")
            self._note_failure(error)
            self._note_commit(ended.model_dir, ended.before)
            for done in ended.waiting:
                done.set_exception(error)
            return
        result = ended.running.committed.result()
        self._queue.mark_durable(ended.applied_seq)
        board.state.last_sync, board.state.sync_error = result, None
        board.state.durable_version = result.weight_version
        note_sync(board.state, result)
        self._told.end(None)
        if result.kind == "full":
            self._full_at, self._is_delta_large = time.monotonic(), False
        else:
            self._is_delta_large = result.delta_bytes > MAX_DELTA_FRACTION * result.bytes_changed
        log.info(
            "synced weight version %d (%s): %d bytes in %.2f s, training waited %.2f s of it; "
            "largest weight %.4g in %s",
            *(result.weight_version, result.kind, result.bytes_written, result.duration_s),
            *(result.training_waited_s, result.max_abs_weight, result.max_abs_name),
        )
        board.on_show()  # the front mirrors it
        for done in ended.waiting:
            done.set_result(result)

    def wait(self) -> None:
        """Until no sync is being written. What it writes counts as getting on."""
        while self._in_progress is not None:
            self._in_progress.running.wait_committed(lambda: self._board.show("syncing"))
            self.look()

    def sync_at_stop(self, has_changed: bool) -> None:
        """The last one: full, so that everything can load the directory. Raises ApolloError."""
        self.wait()
        if has_changed or self._waiting:
            self.start("full")
            self.wait()
            return
        live = self._attachment.live
        if live is not None and live.is_alive():
            disk = WatchedDisk(lambda: self._board.show("syncing"))
            recover(live.model_dir, disk=disk)  # works in a delta

    def refuse_waiting(self, error: ApolloError) -> None:
        while self._waiting:
            self._waiting.pop().done.set_exception(error)

    def _note_failure(self, error: ApolloError) -> None:
        log.error("sync failed: %s", error.message)
        self._board.state.sync_error = error.message
        note_failed_sync(self._board.state)
        self._told.end(error.message)

    def _note_commit(self, model_dir: Path, before: Commit | None) -> None:
        """What failed may have come after the rename that commits: then the commit stands."""
        if (commit := read_commit(model_dir)) is not None and commit != before:
            self._queue.mark_durable(commit.applied_seq)
            self._board.state.durable_version = commit.weight_version


def running_job(queue: JobQueue) -> dict | None:
    """The job that is half done, as the commit record keeps it."""
    running = queue.list(limit=1, state="running")
    if not running or not running[0].steps_done:
        return None
    return {"job_id": running[0].job_id, "steps_done": running[0].steps_done}
