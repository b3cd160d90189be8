"""An older version back into the live weights, between two jobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from apollo_ipc.checkpoint import history, read_commit
from apollo_ipc.errors import ApolloError, CheckpointError, Conflict, UserError
from apollo_ipc.wire.messages import RestoreVersion
from apollo_ipc.wire.replies import RestoreResult
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import PendingRequest, StatusBoard
from apollo_worker.trainer.attachment import Attachment
from apollo_worker.trainer.step_marks import StepMarks
from apollo_worker.trainer.sync_policy import Syncing

log = logging.getLogger(__name__)


class Restoring:
    """announce: tells the routers the weight version; has_changed: whether the live weights differ from the
    checkpoint."""

    def __init__(
        self,
        board: StatusBoard,
        queue: JobQueue,
        attachment: Attachment,
        syncing: Syncing,
        marks: StepMarks,
        *,
        announce: Callable[[], None],
        has_changed: Callable[[], bool],
    ):
        self._board, self._queue, self._attachment = board, queue, attachment
        self._syncing, self._marks = syncing, marks
        self._announce, self._has_changed = announce, has_changed

    def answer(self, asked: PendingRequest, *, is_training: bool) -> None:
        """Raises where this trainer must end: something is changed, and not brought to one state."""
        assert isinstance(asked.request, RestoreVersion)
        before = self._board.state.weight_version
        try:
            if is_training or self._queue.count("running"):  # a paused one has begun, too
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
            is_changed = self._marks.is_torn or self._board.state.weight_version != before
            if is_changed or not isinstance(error, ApolloError):
                raise  # the next trainer mends

    def restore_version(self, weight_version: int) -> RestoreResult:
        """Writes an older version back: on disk as a new commit, then into the live weights.

        The present state is synced first where it can be, so that this step back can be undone.
        """
        live, started = self._attachment.require_live(), time.monotonic()
        self._syncing.wait()  # its commit may take the oldest version's place
        before = read_commit(live.model_dir)
        if before is None:
            raise UserError("nothing was synced yet, so there is no older version", field="VERSION")
        history.find(before, weight_version)
        log.warning(
            "restoring weight version %d; now it is %d", weight_version, self._board.state.weight_version
        )
        if self._has_changed():
            self.sync_before_restore(num_kept=len(before.history) + 1)
        self._board.show("restoring")
        undone = self._queue.ids("undone")
        commit = self._attachment.restore_version(weight_version)
        self._announce()
        now_undone = self._queue.ids("undone")
        num_undone, num_back = len(now_undone - undone), len(undone - now_undone)
        new_version = self._board.state.weight_version
        # What a sync said of the weights that are gone (NaN, for one) is over with them.
        self._board.state.durable_version, self._board.state.sync_error = new_version, None
        log.warning(
            "weight version %d restored as %d; %d jobs undone, %d back",
            *(weight_version, new_version, num_undone, num_back),
        )
        self._board.state.last_restore = RestoreResult(
            restored_version=weight_version,
            weight_version=new_version,
            num_tensors_changed=sum(before.tensors.get(n) != d for n, d in commit.tensors.items()),
            num_jobs_undone=num_undone,
            num_jobs_back=num_back,
            has_optimizer=commit.optimizer is not None,
            duration_s=time.monotonic() - started,
        )
        return self._board.state.last_restore

    def sync_before_restore(self, num_kept: int) -> None:
        """num_kept: that the version which is wanted stays, though it is the oldest."""
        try:
            self._syncing.start("delta", num_kept=num_kept)
            self._syncing.wait()
        except ApolloError as error:
            # Weights that no sync takes (NaN) are what a restore is for.
            log.warning("the present weights are not kept, since they cannot be synced: %s", error.message)
