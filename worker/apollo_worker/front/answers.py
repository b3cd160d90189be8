"""What each request of a client gets: the work itself, off the server's loop.

Three threads, so that none waits for what does not concern it: one accepts jobs (tokenising, commit) in the
order in which they came, one answers questions, one pins (and may wait for a sync of minutes).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from apollo_ipc.checkpoint import pin_version
from apollo_ipc.checkpoint.history import listing
from apollo_ipc.config import Config
from apollo_ipc.errors import CheckpointError, NotReady
from apollo_ipc.manifest import read_manifest
from apollo_ipc.wire.messages import (
    CancelJob,
    GetHistory,
    GetJob,
    GetStatus,
    ListJobs,
    PauseJob,
    PinVersion,
    Preview,
    Reply,
    RestoreVersion,
    ResumeJob,
    Submit,
    SyncCheckpoint,
)
from apollo_ipc.wire.replies import History, JobInfo, PinResult, Previewed, RestoreResult, Status
from apollo_ipc.wire.requests import parse_train_body
from apollo_worker.front.memory import own_memory
from apollo_worker.jobs.example import request_digest
from apollo_worker.jobs.overview import num_jobs, oldest_queued_at
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import StatusBoard

PIN_WAIT_S = 900.0  # a sync of a large model holds the checkpoint for minutes
PIN_LOOK_S = 1.0

Request = (
    Submit
    | Preview
    | GetStatus
    | ListJobs
    | GetJob
    | CancelJob
    | PauseJob
    | ResumeJob
    | SyncCheckpoint
    | RestoreVersion
    | PinVersion
    | GetHistory
)


class Answers:
    """count_peers: (messages that were none, routers), which only the socket knows."""

    def __init__(
        self, config: Config, board: StatusBoard, queue: JobQueue, count_peers: Callable[[], tuple[int, int]]
    ):
        self._config, self._board, self._queue = config, board, queue
        self._count_peers = count_peers
        self._accepting = ThreadPoolExecutor(1, "apollo-accept")
        self._answering = ThreadPoolExecutor(1, "apollo-answer")
        self._pinning = ThreadPoolExecutor(1, "apollo-pin")
        self._is_stopping = threading.Event()

    def stop(self) -> None:
        """Returns when no thread of this uses the queue any more."""
        self._is_stopping.set()
        for executor in (self._accepting, self._answering, self._pinning):
            executor.shutdown(wait=True, cancel_futures=True)

    async def reply_to(self, message: Request) -> Reply:
        """Raises what the client shall be told."""
        request_id = message.request_id
        match message:
            case Submit():
                return Reply(request_id, job=await _in(self._accepting, self._accept, message))
            case Preview():
                shown = await _in(self._accepting, self._preview, message)
                return Reply(request_id, preview=shown)
            case GetStatus():
                return Reply(request_id, status=await _in(self._answering, self._status))
            case ListJobs():
                jobs = await _in(
                    self._answering, self._queue.list, message.limit, message.state, message.before_seq
                )
                return Reply(request_id, jobs=jobs)
            case GetJob():
                return Reply(request_id, job=await self.job(message.job_id, with_history=True))
            case CancelJob() | PauseJob() | ResumeJob():
                job = await _in(self._answering, self._control(message), message.job_id)
                self._board.wake.set()
                return Reply(request_id, job=job)
            case SyncCheckpoint() | RestoreVersion():
                # Shielded: the main loop could not set the result of a cancelled future.
                result = await asyncio.shield(asyncio.wrap_future(self._board.ask(message)))
                if isinstance(result, RestoreResult):
                    return Reply(request_id, restore=result)
                return Reply(request_id, sync=result)
            case PinVersion():
                return Reply(request_id, pin=await _in(self._pinning, self._pin, message.weight_version))
            case GetHistory():
                return Reply(request_id, history=await _in(self._answering, self._history))

    async def job(self, job_id: str, *, with_history: bool = False) -> JobInfo:
        """Raises NotFound."""
        return await _in(self._answering, self._queue.get, job_id, with_history)

    def _control(self, message: CancelJob | PauseJob | ResumeJob) -> Callable[[str], JobInfo]:
        match message:
            case CancelJob():
                return self._queue.cancel
            case PauseJob():
                return self._queue.pause
            case ResumeJob():
                return self._queue.resume

    def _accept(self, submit: Submit) -> JobInfo:
        # Before tokenising: the retry of an accepted job costs nothing and cannot be refused any more.
        request = parse_train_body(submit.body)
        digest = request_digest(request)
        if known := self._queue.find_by_key(submit.idempotency_key, digest):
            return known
        admission = self._board.admit(request)
        job = self._queue.submit(
            admission.plan, digest, notes=admission.notes, idempotency_key=submit.idempotency_key
        )
        self._board.wake.set()
        return job

    def _preview(self, preview: Preview) -> list[Previewed]:
        return self._board.preview(parse_train_body(preview.body))

    def _status(self) -> Status:
        num_bad_messages, num_routers = self._count_peers()
        return self._board.status(
            num_jobs=num_jobs(self._queue),
            oldest_queued_at=oldest_queued_at(self._queue),
            num_bad_messages=num_bad_messages,
            num_routers=num_routers,
            worker_pid=os.getpid(),
            memory_bytes=own_memory({"front": os.getpid(), "trainer": self._board.trainer.pid}),
        )

    def _history(self) -> History:
        return listing(self._model_dir())

    def _pin(self, weight_version: int | None) -> PinResult:
        """Raises UserError where that version is not kept, CheckpointError; NotReady where there is no model,
        another process keeps the checkpoint busy, or the worker stops."""
        model_dir, give_up_at = self._model_dir(), time.monotonic() + PIN_WAIT_S
        while True:
            try:
                before = pin_version(model_dir, weight_version, lock_wait_s=PIN_LOOK_S)
            except CheckpointError as error:
                if error.code != "checkpoint_busy":
                    raise
                if time.monotonic() >= give_up_at:
                    raise NotReady(error.message, code=error.code) from None
                if self._is_stopping.is_set():
                    raise NotReady(
                        "the worker is stopping; send the request again", code="stopping"
                    ) from None
            else:
                return PinResult(str(model_dir), weight_version, before)

    def _model_dir(self) -> Path:
        """Of the model last attached to, or of the one that is served."""
        if self._board.state.model_path is not None:
            return Path(self._board.state.model_path)
        if (manifest := read_manifest(self._config.runtime_dir)) is None:
            raise NotReady("no model is being served here yet, so its checkpoint cannot be found")
        return Path(manifest.model_path)


def _in(executor: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Awaitable[Any]:
    return asyncio.get_running_loop().run_in_executor(executor, function, *args)
