"""What can be asked of the jobs: on a connection of its own, so that no question waits for a writer (WAL)."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

import msgspec

from apollo_ipc.errors import Conflict, NotFound
from apollo_ipc.wire.messages import JobInfo, JobState
from apollo_ipc.wire.requests import TrainRequest
from apollo_worker.jobs.queue_file import JOB_COLUMNS, MAX_VARIABLES, connect, encode_request, job_info

Jobs = list[JobInfo]  # inside the classes, `list` is their method


class QueueReader:
    """Thread-safe. path: of a queue's file, which is there (queue_file.open_file makes it)."""

    def __init__(self, path: Path, busy_timeout_s: float):
        self._reader_lock = threading.Lock()
        self._reader = connect(path, busy_timeout_s)

    def close(self) -> None:
        with self._reader_lock:
            self._reader.close()

    # --- one job ---

    def get(self, job_id: str, with_history: bool = False) -> JobInfo:
        """Raises NotFound. `with_history` fills loss_history (one loss for each step done)."""
        with self._reader_lock:
            info = read_job(self._reader, job_id)
            if not with_history:
                return info
            rows = self._reader.execute("SELECT loss FROM losses WHERE seq = ? ORDER BY step", (info.seq,))
            # SQLite stores NaN as NULL (its "Datatypes" page).
            history = [math.nan if row[0] is None else row[0] for row in rows]
        return msgspec.structs.replace(info, loss_history=history)

    def find_by_key(self, idempotency_key: str | None, request: TrainRequest) -> JobInfo | None:
        """The job accepted under this key, or None. Raises Conflict (422) where its body was another."""
        if idempotency_key is None:
            return None
        digest = encode_request(request)[1]
        with self._reader_lock:
            return read_job_of_key(self._reader, idempotency_key, digest)

    def is_cancel_requested(self, job_id: str) -> bool:
        """From the file, since the front is asked: some 10 us, so it may precede every step."""
        with self._reader_lock:
            row = self._reader.execute(
                "SELECT cancel_requested FROM jobs WHERE job_id = ?", (job_id,)
            ).fetchone()
        return row is not None and row[0] is not None

    # --- all of them ---

    def list(self, limit: int = 50, state: JobState | None = None) -> Jobs:
        """The newest `limit` jobs (of one state, if given), newest first."""
        with self._reader_lock:
            rows = self._reader.execute(
                f"SELECT {JOB_COLUMNS} FROM jobs WHERE ?1 IS NULL OR state = ?1 ORDER BY seq DESC LIMIT ?2",
                (state, max(0, limit)),
            )
            return [job_info(row) for row in rows]

    def count_queued(self) -> int:
        with self._reader_lock:
            return read_num_queued(self._reader)

    def applied_seq(self) -> int:
        """The highest seq such that it and every job before it has ended; 0 where there is none."""
        with self._reader_lock:
            return self._reader.execute(
                "SELECT coalesce((SELECT min(seq) - 1 FROM jobs WHERE state IN ('queued', 'running')), "
                "(SELECT max(seq) FROM jobs), 0)"
            ).fetchone()[0]

    def known_examples(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Those of `hashes` that were trained before."""
        todo, known = [*dict.fromkeys(hashes)], set()
        with self._reader_lock:
            for start in range(0, len(todo), MAX_VARIABLES):
                some = todo[start : start + MAX_VARIABLES]
                marks = ", ".join("?" * len(some))
                known.update(
                    row[0]
                    for row in self._reader.execute(
                        f"SELECT hash FROM examples WHERE hash IN ({marks})", some
                    )
                )
        return known


# What a writer asks as well, inside its transaction and on its own connection:


def read_job(db: sqlite3.Connection, job_id: str) -> JobInfo:
    """Raises NotFound."""
    row = db.execute(f"SELECT {JOB_COLUMNS} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(f"no job {job_id!r}")
    return job_info(row)


def read_job_of_key(db: sqlite3.Connection, key: str, digest: bytes) -> JobInfo | None:
    row = db.execute(
        f"SELECT {JOB_COLUMNS}, request_digest FROM jobs WHERE idempotency_key = ?", (key,)
    ).fetchone()
    if row is None:
        return None
    if row["request_digest"] != digest:
        raise Conflict(
            f"idempotency key {key!r} was used for job {row['job_id']} with another body; use a new key",
            field="idempotency_key",
        )
    return job_info(row)


def read_num_queued(db: sqlite3.Connection) -> int:
    return db.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
