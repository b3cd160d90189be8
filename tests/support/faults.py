"""Every call of the layers below the trainer (files, SQLite, device copies, marks) may raise, one at a time.

A run counts its points; another run raises at one of them. What is raised before a call has done nothing,
what is raised after it has done everything: a file system reports both.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from apollo_worker.jobs import queue_file
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import StatusBoard
from apollo_worker.model.host_buffer import HostBuffer
from apollo_worker.model.live_model import LiveModel
from apollo_worker.optimizer.apollo import Apollo
from apollo_worker.sync.copy_out import CopyOut
from apollo_worker.trainer import attachment, recovery, step_marks, sync_policy
from apollo_worker.trainer.step_marks import StepMarks

from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.errors import CheckpointError


class Point(NamedTuple):
    kind: str
    number: int  # of its kind, from 1

    def __str__(self) -> str:
        return f"{self.kind} #{self.number}"


def disk_error() -> CheckpointError:
    error = CheckpointError("cannot write: Input/output error")  # what the file layer makes of it
    error.__cause__ = io_error()
    return error


def io_error() -> OSError:
    return OSError(errno.EIO, "Input/output error")


def sqlite_error() -> sqlite3.Error:
    return sqlite3.OperationalError("disk I/O error")


def device_error() -> RuntimeError:
    return RuntimeError("an error of the device")


class Faults:
    """Off but in `raising` and `counting`."""

    def __init__(self) -> None:
        self.seen: list[Point] = []
        self.has_raised = False
        self._at: Point | None = None
        self._error: BaseException | None = None  # in place of the layer's own
        self._is_on = False
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def raising(self, at: Point | None = None, error: BaseException | None = None) -> Iterator[None]:
        """at: None to count only."""
        self._at, self._error, self.has_raised, self.seen = at, error, False, []
        self._counts.clear()
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        was_on, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = was_on

    def reach(self, kind: str, error: Callable[[], BaseException]) -> None:
        with self._lock:
            if not self._is_on:
                return
            self._counts[kind] += 1
            point = Point(kind, self._counts[kind])
            self.seen.append(point)
            if point != self._at:
                return
            self.has_raised = True
        raise self._error or error()

    def wrap(self, kind: str, function: Callable, error: Callable[[], BaseException], *, both: bool = True):
        """Points before `function` and, with both, after it."""

        @wraps(function)
        def call(*args, **kwargs):
            self.reach(kind, error)
            result = function(*args, **kwargs)
            if both:
                self.reach(f"{kind}, done", error)
            return result

        return call

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrap(owner, name: str, kind: str, error: Callable[[], BaseException], *, both: bool = True):
            monkeypatch.setattr(owner, name, self.wrap(kind, getattr(owner, name), error, both=both))

        for name in ("create", "open", "write", "sync", "close", "sync_dir", "rename", "link", "unlink"):
            wrap(Disk, name, f"disk {name}", disk_error)
        for name in ("mkdir", "rmdir"):
            wrap(Disk, name, f"disk {name}", disk_error)
        wrap(Disk, "lock", "disk lock", disk_error, both=False)
        for owner in (recovery, sync_policy):
            wrap(owner, "read_commit", "file read_commit", disk_error, both=False)
        for owner, name in (
            (attachment, "read_state"),
            (attachment, "read_optimizer"),
            (attachment, "read_ranks"),
            (recovery, "shard_index"),
            (recovery, "safe_open"),
        ):
            wrap(owner, name, f"file {name}", io_error, both=False)
        files = SimpleNamespace(**{name: getattr(step_marks.os, name) for name in dir(step_marks.os)})
        for name in ("open", "ftruncate", "fsync", "rename"):
            wrap(files, name, f"state file {name}", io_error)
        monkeypatch.setattr(step_marks, "os", files)
        for name in ("_write", "clear"):
            wrap(StepMarks, name, f"mark {name}", device_error)
        wrap(JobQueue, "_changed", "queue, after its commit", device_error, both=False)
        monkeypatch.setattr(queue_file, "_connect", self._connect)
        for owner, name in (
            (attachment, "attach"),
            (LiveModel, "close"),
            (Apollo, "load_state"),
            (CopyOut, "put"),
            (StatusBoard, "show"),
        ):
            wrap(owner, name, f"device {name}" if owner is not StatusBoard else "status", device_error)
        blocks = HostBuffer.blocks

        def read(buffer, *args):
            for block in blocks(buffer, *args):
                self.reach("device read", device_error)
                yield block

        monkeypatch.setattr(HostBuffer, "blocks", read)

    def _connect(self, path, busy_timeout_s):
        faults = self

        class Connection(sqlite3.Connection):
            def execute(self, sql, *args):
                faults.reach(f"sqlite {sql.split()[0].upper()}", sqlite_error)
                return super().execute(sql, *args)

            def commit(self):
                faults.reach("sqlite COMMIT", sqlite_error)
                super().commit()

        db = sqlite3.connect(
            path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False, factory=Connection
        )
        db.row_factory = sqlite3.Row
        return db
