"""What a process's main loop and its server share: the trainer's own, and in the front the last it heard.

The main loop writes, the server answers from it without waiting for a training step. In the worker the two
are processes: the trainer's `state` goes over the link as it is, and stands in the front's board as it came.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import msgspec

from apollo_ipc.errors import NotReady
from apollo_ipc.process.flag import Flag
from apollo_ipc.webhooks.outbox import EventType
from apollo_ipc.wire.messages import RestoreVersion, SyncCheckpoint
from apollo_ipc.wire.replies import (
    PostSync,
    Previewed,
    Progress,
    RestoreResult,
    Status,
    SyncResult,
    TrainerState,
)
from apollo_ipc.wire.requests import TrainRequest
from apollo_worker.jobs.job_plan import JobPlan


class Admission(msgspec.Struct, frozen=True):
    """A request that can be queued: what will be trained, and what its sender should know."""

    plan: JobPlan
    notes: list[str] = []


class PendingRequest(msgspec.Struct, frozen=True):
    """What a client wants of the main loop, to be done between two steps."""

    request: SyncCheckpoint | RestoreVersion
    done: Future[SyncResult | RestoreResult]


class SeenTrainer(msgspec.Struct, frozen=True):
    """The trainer as its parent sees it. num_deaths: ends with another status than 0, num_kills: of those
    that hung; both since the worker's start."""

    pid: int | None = None
    num_deaths: int = 0
    num_kills: int = 0


def admit_nothing(request: TrainRequest) -> Admission:
    raise NotReady("this process accepts no jobs")


def preview_nothing(request: TrainRequest) -> list[Previewed]:
    raise NotReady("this process has no tokenizer")


class StatusBoard:
    """Fields of `state` are replaced whole (an atomic store), never changed in place.

    on_show: called by `show`, once it has changed `state.progress`.
    """

    def __init__(
        self,
        admit: Callable[[TrainRequest], Admission] = admit_nothing,
        on_show: Callable[[], None] = lambda: None,
    ):
        self.on_show = on_show
        self.worker_boot_id = uuid.uuid4().hex
        # Raises UserError (bad example) or NotReady (no model known yet). Called off the server's loop.
        self.admit = admit
        self.preview: Callable[[TrainRequest], list[Previewed]] = preview_nothing
        self.state = TrainerState(Progress("starting", 0))
        self.post_sync: PostSync | None = None
        self.trainer_error: str | None = None
        self.trainer = SeenTrainer()
        # Trainer: tells webhooks of what only it sees (type, subject, data); it never raises.
        self.tell: Callable[[EventType, str, dict[str, Any]], None] = lambda *what: None
        self.stopping = Flag()  # set by signal handlers
        # Wakes the main loop: a job was queued, something was asked for, the process shall stop.
        self.wake = threading.Event()
        self.asked: SimpleQueue[PendingRequest] = SimpleQueue()

    def show(self, activity: str, **details) -> None:
        """Main loop: what it does now. Every call counts as progress."""
        self.state.progress = Progress(activity, self.state.progress.activity_count + 1, **details)
        self.on_show()

    def ask(self, request: SyncCheckpoint | RestoreVersion) -> Future[SyncResult | RestoreResult]:
        """Server: have the main loop do it between two steps."""
        asked = PendingRequest(request, Future())
        self.asked.put(asked)
        self.wake.set()
        return asked.done

    def status(
        self,
        *,
        num_jobs: dict[str, int],
        oldest_queued_at: float | None,
        num_bad_messages: int,
        num_routers: int,
        worker_pid: int,
        memory_bytes: dict[str, int],
    ) -> Status:
        return Status(
            **msgspec.structs.asdict(self.state),
            worker_boot_id=self.worker_boot_id,
            worker_pid=worker_pid,
            num_queued=num_jobs.get("queued", 0),
            num_bad_messages=num_bad_messages,
            num_routers=num_routers,
            post_sync=self.post_sync,
            trainer_error=self.trainer_error,
            num_jobs=num_jobs,
            oldest_queued_at=oldest_queued_at,
            num_trainer_deaths=self.trainer.num_deaths,
            num_watchdog_kills=self.trainer.num_kills,
            memory_bytes=memory_bytes,
        )
