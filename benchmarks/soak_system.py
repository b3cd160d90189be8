"""A real vLLM and a real worker on a tiny model, and every way of killing them. For soak.py."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from apollo_worker.jobs.queue_file import QueueFile

from apollo_ipc.config import load_config
from apollo_ipc.errors import ApolloError
from apollo_ipc.keys import train_key
from apollo_ipc.process.serving import VllmServer, worker_command, worker_environment
from apollo_ipc.wire.client import call
from apollo_ipc.wire.messages import SyncCheckpoint, SyncKind
from apollo_ipc.wire.replies import JobInfo

START_S = 300.0
# Syncs so often that a kill meets one now and then even unasked; both kinds; older versions beside them.
SETTINGS = {
    "APOLLO_TRAIN__MAX_TOKENS": "512",
    "APOLLO_CHECKPOINT__SYNC_INTERVAL_S": "2",
    "APOLLO_CHECKPOINT__FULL_INTERVAL_S": "15",
    "APOLLO_CHECKPOINT__HISTORY": "2",
    "APOLLO_CHECKPOINT__BULK_JOB_STEPS": "20",
    "APOLLO_WORKER__MAX_QUEUED_JOBS": "100",
    "APOLLO_WORKER__IDLE_PRIORITY": "false",  # more steps between two kills
}
SYNC_FILES = ("pending-*", "delta-*", "optimizer-*", "commit.json.new", "old-*", "undo-*", "fold-*")


class SoakFailed(Exception):
    """Something did not come back, or did not end, in its time."""


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float, every_s: float = 0.1) -> Any:
    """The condition's first true value. Raises SoakFailed naming `what`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every_s)
    raise SoakFailed(f"{what}: not within {timeout_s:.0f} s")


def runs(pid: int) -> bool:
    """Whether the process computes still: a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class System:
    """Start and kill from the main thread only: the kernel ties children to the thread that made them."""

    def __init__(self, model_dir: Path, base: Path, settings: dict[str, str] | None = None):
        self.model_dir, self.base = model_dir, base
        self.server = VllmServer(model_dir, base, ["--enforce-eager"], env=SETTINGS | (settings or {}))
        self.env = worker_environment(self.server.env)
        self.poison: int | None = None  # the first token of a job that kills its trainer
        self.config = load_config(environ=self.env)
        self.worker: subprocess.Popen | None = None
        self.started_at = 0.0  # of vLLM's last start, time.monotonic()
        self._reader: QueueFile | None = None
        self._downs: list[tuple[float, float | None]] = []  # vLLM's downtimes, time.monotonic()

    # --- starting ---

    def start_vllm(self) -> float:
        """Seconds until /health answers."""
        self.started_at = time.monotonic()
        self.server.start()
        self.server.wait_until_ready(START_S)
        if self._downs:
            self._downs[-1] = self._downs[-1][0], time.monotonic()
        return time.monotonic() - self.started_at

    def stop_vllm(self) -> None:
        self._downs.append((time.monotonic(), None))
        self.server.stop()

    def start_worker(self) -> None:
        """The first time, its queue is there when this returns."""
        with (self.base / "worker.log").open("ab") as log:
            self.worker = subprocess.Popen(
                worker_command(), env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        path = self.config.state_dir / "queue.sqlite"
        if self._reader is None:
            wait_for(path.exists, "the queue's file", 60)
            time.sleep(1)
            self._reader = QueueFile(path, busy_timeout_s=60)

    def wait_until_training(self) -> None:
        wait_for(self.can_train, "training possible again", START_S)

    def can_train(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.server.url}/train/health", timeout=5).status_code == 200
        return False

    # --- ending ---

    def kill_vllm(self) -> None:
        """The whole process group, at once."""
        self._downs.append((time.monotonic(), None))
        with suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.stop()  # reaps

    def trainer_pid(self) -> int | None:
        """The front's child, where it has one."""
        assert self.worker is not None
        with suppress(OSError):
            children = Path(f"/proc/{self.worker.pid}/task/{self.worker.pid}/children").read_text().split()
            return int(children[0]) if children else None
        return None

    def kill_worker(self, parts: str) -> int | None:
        """parts: "front", "trainer" or "worker" (both). Returns the pid of the trainer, which may live on."""
        assert self.worker is not None
        trainer = self.trainer_pid()
        for pid, part in ((trainer, "trainer"), (self.worker.pid, "front")):
            if parts in (part, "worker") and pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if parts != "trainer":
            self.worker.wait(10)
        return trainer

    def stop_worker(self) -> int:
        assert self.worker is not None
        self.worker.terminate()
        return self.worker.wait(120)

    def close(self) -> None:
        if self.worker is not None and self.worker.poll() is None:
            trainer = self.trainer_pid()
            self.worker.kill()
            self.worker.wait()
            if trainer is not None and runs(trainer):
                with suppress(ProcessLookupError):
                    os.kill(trainer, signal.SIGKILL)
        self.server.stop()
        if self._reader is not None:
            self._reader.close()

    # --- asking ---

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {train_key(self.config)}"}

    def was_down(self, since: float, until: float) -> bool:
        """Whether vLLM was killed, or not yet back, at some time between the two (time.monotonic())."""
        return any(killed <= until and (back is None or back >= since) for killed, back in self._downs)

    def jobs(self) -> list[JobInfo]:
        """All of them, from the queue's file: that is there when nobody answers."""
        return self._reader.list(limit=10**9) if self._reader else []

    def ask_for_sync(self, kind: SyncKind) -> threading.Thread:
        """What `apollo-ipc checkpoint sync [--delta]` does, without waiting for its answer."""

        def ask() -> None:
            with suppress(ApolloError):  # it may be killed meanwhile
                call(self.config.socket_path, SyncCheckpoint("", kind), timeout_s=60)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        return thread

    def sync_files(self) -> set[str]:
        """What lies in .apollo of any sync."""
        state_dir = self.model_dir / ".apollo"
        return {path.name for pattern in SYNC_FILES for path in state_dir.glob(pattern)}

    def count_in_log(self, text: str) -> int:
        return (self.base / "worker.log").read_text(errors="replace").count(text)

    def log_tail(self) -> str:
        path = self.base / "worker.log"
        return (path.read_text(errors="replace") if path.exists() else "")[-3000:] + self.server.log_tail()
