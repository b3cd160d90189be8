"""What a process's main loop and its service share: the trainer's own, and in the front a mirror of it.

The main loop writes, the service reads and answers from it without waiting for a training step. In the worker
the two are processes: the trainer sends `state()` over the link, and the front's `mirror` takes it over.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import msgspec

from apollo_ipc.errors import NotReady
from apollo_ipc.process.flag import Flag
from apollo_ipc.wire.messages import (
    PostSync,
    Previewed,
    Progress,
    RestoreResult,
    RestoreVersion,
    Status,
    SyncCheckpoint,
    SyncResult,
)
from apollo_ipc.wire.requests import TrainRequest
from apollo_worker.jobs.job_plan import JobPlan
from apollo_worker.link.link import State

_KNOWN_BEFORE_ATTACHING = ("progress", "attached", "attach_error", "refused")


class Admission(msgspec.Struct, frozen=True):
    """A request that can be queued: what will be trained, and what its sender should know."""

    plan: JobPlan
    notes: list[str] = []


class Asked(msgspec.Struct, frozen=True):
    """What a client wants of the main loop, to be done between two steps."""

    request: SyncCheckpoint | RestoreVersion
    done: Future[SyncResult | RestoreResult]


def admit_nothing(request: TrainRequest) -> Admission:
    raise NotReady("this process accepts no jobs")


def preview_nothing(request: TrainRequest) -> list[Previewed]:
    raise NotReady("this process has no tokenizer")


class Shared:
    """Every attribute is replaced whole (an atomic store), never changed in place.

    on_show: called by `show`, once it has changed `progress`.
    """

    def __init__(
        self,
        admit: Callable[[TrainRequest], Admission] = admit_nothing,
        on_show: Callable[[], None] = lambda: None,
    ):
        self.on_show = on_show
        self.worker_boot_id = uuid.uuid4().hex
        # Raises UserError (bad example) or NotReady (no model known yet). Called off the service's loop.
        self.admit = admit
        self.preview: Callable[[TrainRequest], list[Previewed]] = preview_nothing
        self.progress = Progress(activity="starting", activity_count=0)
        self.vllm_boot_id: str | None = None
        self.vllm_pid: int | None = None
        self.attached = False
        self.attach_error: str | None = None
        self.model_path: str | None = None
        self.weight_version = 0
        self.durable_version = 0
        self.num_parameters = 0
        self.num_parameters_mapped = 0
        self.optimizer_state_bytes = 0
        self.refused: list[str] = []
        self.last_sync: SyncResult | None = None
        self.sync_error: str | None = None
        self.is_syncing = False
        self.post_sync: PostSync | None = None
        self.stopping = Flag()  # set by signal handlers
        # Wakes the main loop: a job was queued, something was asked for, the process shall stop.
        self.wake = threading.Event()
        self.asked: SimpleQueue[Asked] = SimpleQueue()

    def show(self, activity: str, **details) -> None:
        """Main loop: what it does now. Every call counts as getting on."""
        self.progress = Progress(
            activity=activity, activity_count=self.progress.activity_count + 1, **details
        )
        self.on_show()

    def state(self) -> State:
        """Trainer: all that the front needs to answer in its place."""
        return State(**{name: getattr(self, name) for name in State.__struct_fields__})

    def mirror(self, state: State) -> None:
        """Front: what the trainer says. What it learns by attaching is kept until a new one has attached."""
        has_attached = state.model_path is not None
        for name in State.__struct_fields__ if has_attached else _KNOWN_BEFORE_ATTACHING:
            if name != "last_sync" or state.last_sync is not None:
                setattr(self, name, getattr(state, name))

    def ask(self, request: SyncCheckpoint | RestoreVersion) -> Future[SyncResult | RestoreResult]:
        """Service: have the main loop do it between two steps."""
        asked = Asked(request, Future())
        self.asked.put(asked)
        self.wake.set()
        return asked.done

    def status(self, *, num_queued: int, num_bad_messages: int, num_routers: int, worker_pid: int) -> Status:
        return Status(
            worker_boot_id=self.worker_boot_id,
            worker_pid=worker_pid,
            vllm_boot_id=self.vllm_boot_id,
            vllm_pid=self.vllm_pid,
            attached=self.attached,
            attach_error=self.attach_error,
            model_path=self.model_path,
            weight_version=self.weight_version,
            durable_version=self.durable_version,
            num_parameters=self.num_parameters,
            num_parameters_mapped=self.num_parameters_mapped,
            num_queued=num_queued,
            progress=self.progress,
            last_sync=self.last_sync,
            sync_error=self.sync_error,
            num_bad_messages=num_bad_messages,
            num_routers=num_routers,
            optimizer_state_bytes=self.optimizer_state_bytes,
            refused=self.refused,
            is_syncing=self.is_syncing,
            post_sync=self.post_sync,
        )
