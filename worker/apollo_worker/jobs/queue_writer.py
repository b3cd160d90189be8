"""How the jobs are changed: one transaction at a time, told to whoever listens once it is committed."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_ipc.errors import NotReady
from apollo_ipc.wire.messages import JobInfo
from apollo_worker.jobs.queue_file import open_file
from apollo_worker.jobs.queue_reader import Jobs, QueueReader


class QueueWriter(QueueReader):
    """Thread-safe. `on_change`, where set, is called with each changed job after the commit, in the thread
    that changed it and without the lock: two threads' calls may arrive in either order.

    path: made where there is none. busy_timeout_s: how long a change waits for another process's, before it
    raises NotReady (code `busy`). Raises QueueDamaged (see queue_file).
    """

    def __init__(self, path: Path, busy_timeout_s: float):
        self.on_change: Callable[[JobInfo], None] | None = None
        self._lock = threading.RLock()
        self._db = open_file(path, busy_timeout_s)
        super().__init__(path, busy_timeout_s)

    def close(self) -> None:
        with self._lock:
            self._db.close()
        super().close()

    @property
    def queue_id(self) -> int:
        """Tells this file from another one: a checkpoint's record of jobs is of one queue only."""
        with self._lock:
            return self._db.execute("PRAGMA application_id").fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commits at the end, rolls back on any exception. IMMEDIATE: the write lock is taken first."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                raise NotReady("the trainer is writing to the queue; send it again", code="busy") from error
            try:
                yield
                self._db.commit()  # may fail too: the disk is full
            except BaseException:
                self._db.rollback()
                raise

    def _changed(self, job_id: str) -> JobInfo:
        info = self.get(job_id)
        if self.on_change is not None:
            self.on_change(info)
        return info

    def _set(self, change: str, where: str, values: tuple) -> Jobs:
        """The jobs `where` that then changed. values: of the `?` in `where`."""
        with self._transaction():
            rows = self._db.execute(f"SELECT job_id FROM jobs WHERE {where} ORDER BY seq", values).fetchall()
            self._db.execute(f"UPDATE jobs SET {change} WHERE {where}", values)
        return [self._changed(row[0]) for row in rows]
