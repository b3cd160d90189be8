"""What the worker says of itself, as metrics on vLLM's /metrics.

Several API servers may belong to one worker. Gauges are set by each of them, with the same value; a counter
is increased by one of them only, whoever holds the lock, since their values are added up.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import get_args

from prometheus_client import Counter, Gauge

from apollo_ipc.hold import Held, Hold
from apollo_ipc.wire.replies import JobState, Status

PHASES = ("forward", "backward", "record", "publish")


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"apollo_{name}", text, labels, multiprocess_mode="mostrecent")


attached = _gauge("attached", "1 while the worker has mapped the served weights.")
durable_version = _gauge("durable_version", "Version of the weights on disk.")
jobs = _gauge("jobs", "Jobs by state.", "state")
queue_age = _gauge("queue_age_seconds", "Age of the oldest queued job; 0 where none waits.")
train_loss = _gauge("train_loss", "Loss of the last training step in nats a token; NaN before the first.")
last_sync = _gauge("last_sync_timestamp_seconds", "When the last checkpoint was committed; 0: never.")
optimizer_bytes = _gauge("optimizer_state_bytes", "Size of the optimizer's moments.")
memory_bytes = _gauge("worker_memory_bytes", "Resident memory of its own, without the weights.", "process")
device_bytes = _gauge("device_memory_bytes", "The most that training has reserved on the GPU.")

train_steps = Counter("apollo_train_steps", "Training steps.")
bad_steps = Counter("apollo_train_bad_steps", "Steps with a loss or gradient that was not finite.")
train_tokens = Counter("apollo_train_tokens", "Tokens that training has read.")
step_seconds = Counter("apollo_train_step_seconds", "Time in training steps.", ["phase"])
syncs = Counter("apollo_syncs", "Checkpoints committed.")
sync_failures = Counter("apollo_sync_failures", "Checkpoints that failed; the one on disk stayed whole.")
sync_seconds = Counter("apollo_sync_seconds", "Time until checkpoints were durable.")
sync_waited_seconds = Counter("apollo_sync_waited_seconds", "Part of it in which training stood still.")
sync_bytes = Counter("apollo_sync_written_bytes", "Bytes written by checkpoints.")
torn_steps = Counter("apollo_torn_steps", "Steps that were cut off, and mended.")
trainer_deaths = Counter("apollo_trainer_deaths", "Ends of the trainer process that were no clean stop.")
watchdog_kills = Counter("apollo_watchdog_kills", "Trainers that hung and were killed.")


class WorkerMetrics:
    """`show` each status. Several API servers of one runtime directory: one of them counts."""

    def __init__(self, runtime_dir: Path):
        self._lock_path = runtime_dir / "metrics.lock"
        self._hold: Hold | None = None
        self._seen: dict[Counter, float] = {}
        self._boot_id: str | None = None

    def show(self, status: Status) -> None:
        attached.set(status.attached)
        durable_version.set(status.durable_version)
        for state in get_args(JobState):
            jobs.labels(state).set(status.num_jobs.get(state, 0))
        waiting_since = status.oldest_queued_at
        queue_age.set(0 if waiting_since is None else max(0.0, time.time() - waiting_since))
        loss = status.progress.loss
        if loss is not None or not status.tally.num_steps:
            train_loss.set(math.nan if loss is None else loss)
        last_sync.set(status.last_sync.committed_at if status.last_sync else 0)
        optimizer_bytes.set(status.optimizer_state_bytes)
        device_bytes.set(status.device_bytes)
        for process, size in status.memory_bytes.items():
            memory_bytes.labels(process).set(size)
        self._count(status)

    def _count(self, status: Status) -> None:
        """A worker's totals begin at 0: of a new one they are counted whole."""
        if status.worker_boot_id != self._boot_id:
            self._boot_id, self._seen = status.worker_boot_id, {}
        may_count = self.may_count()
        for counter, total in _totals(status).items():
            grown = total - self._seen.get(counter, 0)
            self._seen[counter] = total
            if may_count and grown > 0:
                counter.inc(grown)

    def may_count(self) -> bool:
        """Whoever takes the lock first counts until its end; the kernel frees it then."""
        if self._hold is None:
            with suppress(Held):
                self._hold = Hold(self._lock_path, "an API server of vLLM")
        return self._hold is not None

    def close(self) -> None:
        if self._hold is not None:
            self._hold.release()
            self._hold = None


def _totals(status: Status) -> dict[Counter, float]:
    tally = status.tally
    return {
        train_steps: tally.num_steps,
        bad_steps: tally.num_bad_steps,
        train_tokens: tally.num_tokens,
        **{step_seconds.labels(phase): tally.step_s.get(phase, 0.0) for phase in PHASES},
        syncs: tally.num_syncs,
        sync_failures: tally.num_sync_failures,
        sync_seconds: tally.sync_s,
        sync_waited_seconds: tally.sync_waited_s,
        sync_bytes: tally.sync_bytes,
        torn_steps: tally.num_torn_steps,
        trainer_deaths: status.num_trainer_deaths,
        watchdog_kills: status.num_watchdog_kills,
    }
