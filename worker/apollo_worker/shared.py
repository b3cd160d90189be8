"""What the worker's two threads share: the main loop (training) and the service (ZMQ).

The main loop writes, the service reads and answers from it without waiting for a training step.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import msgspec

from apollo_ipc.messages import Progress, Status, SyncResult
from apollo_ipc.requests import TrainRequest


class Admission(msgspec.Struct, frozen=True):
    """What the tokenizer says of a request before it is queued."""

    num_steps: int
    num_skipped: int = 0
    notes: list[str] = []


class Shared:
    """Every attribute is replaced whole (an atomic store), never changed in place."""

    def __init__(self, admit: Callable[[TrainRequest], Admission]):
        self.worker_boot_id = uuid.uuid4().hex
        # Raises UserError (bad example) or NotReady (no model known yet). Called off the service's loop.
        self.admit = admit
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
        self.stopping = threading.Event()
        # Wakes the main loop: a job was queued, a sync was asked for, the process shall stop.
        self.wake = threading.Event()
        self.sync_requests: SimpleQueue[Future[SyncResult]] = SimpleQueue()

    def show(self, activity: str, **details) -> None:
        """Main loop: what it does now. Every call counts as getting on."""
        self.progress = Progress(
            activity=activity, activity_count=self.progress.activity_count + 1, **details
        )

    def request_sync(self) -> Future[SyncResult]:
        """Service: ask the main loop for a checkpoint sync between two steps."""
        future: Future[SyncResult] = Future()
        self.sync_requests.put(future)
        self.wake.set()
        return future

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
        )
