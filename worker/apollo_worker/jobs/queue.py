"""The jobs: an SQLite file that survives whatever happens to this process.

A method returns after its commit, and with synchronous=FULL a commit in WAL mode has been flushed (SQLite's
"Write-Ahead Logging" page, section "Performance Considerations"). Jobs train one at a time in order of `seq`.

    queued -> running -> applied -> durable        applied: in vLLM's memory; durable: on disk
       |         |-----> failed | cancelled
       |---------|-----> cancelled, quarantined    quarantined: crashed the worker MAX_CRASHES times

Two processes have the file open: the front submits and cancels, the trainer does the rest. Every change is
one IMMEDIATE transaction; reads have a connection of their own and wait for no writer (WAL).

This file is the API, of which queue_reader has the questions and queue_writer how a change is made;
apollo_worker.jobs.queue_file knows the file, its schema and what a row means.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from apollo_ipc.errors import Conflict, NotReady
from apollo_ipc.wire.messages import ENDED_STATES, JobInfo, JobState
from apollo_ipc.wire.requests import TrainRequest
from apollo_worker.jobs.queue_file import BUSY_TIMEOUT_S, decode_request, encode_request
from apollo_worker.jobs.queue_reader import Jobs, read_job, read_job_of_key, read_num_queued
from apollo_worker.jobs.queue_writer import QueueWriter

MAX_CRASHES = 3


class Job(msgspec.Struct, frozen=True):
    """A job that was taken, with what to train on."""

    info: JobInfo
    request: TrainRequest


class JobQueue(QueueWriter):
    """max_queued: how many jobs may wait. The rest, `on_change` too, as QueueWriter says."""

    def __init__(self, path: Path, max_queued: int, busy_timeout_s: float = BUSY_TIMEOUT_S):
        super().__init__(path, busy_timeout_s)
        self._max_queued = max_queued
        self._taken: set[str] = set()  # jobs whose attempt by this process has been counted

    # --- accepting ---

    def submit(
        self,
        request: TrainRequest,
        *,
        num_steps: int,
        num_skipped: int = 0,
        notes: Iterable[str] = (),
        idempotency_key: str | None = None,
    ) -> JobInfo:
        """Accepts a job and returns after the commit; the same key and body give the job of the first time.

        Raises Conflict (422: key used with another body), NotReady (code `queue_full`).
        """
        body, digest = encode_request(request)
        # Sortable by time, unique without asking anyone.
        job_id = f"job-{time.time_ns() // 1_000_000:012x}-{secrets.token_hex(4)}"
        with self._transaction():
            if idempotency_key is not None and (known := read_job_of_key(self._db, idempotency_key, digest)):
                return known
            if (num_queued := read_num_queued(self._db)) >= self._max_queued:
                raise NotReady(
                    f"{num_queued} jobs are waiting (limit worker.max_queued_jobs); send it again later",
                    code="queue_full",
                )
            cursor = self._db.execute(
                "INSERT INTO jobs (job_id, state, created_at, num_examples, num_steps, num_skipped, "
                "idempotency_key, request_digest, notes) VALUES (?, 'queued', ?, ?, ?, ?, ?, ?, ?)",
                (
                    job_id, time.time(), len(request.examples), num_steps, num_skipped, idempotency_key,
                    digest, json.dumps(list(notes)),
                ),
            )  # fmt: skip
            self._db.execute("INSERT INTO requests (seq, body) VALUES (?, ?)", (cursor.lastrowid, body))
        return self._changed(job_id)

    # --- training ---

    def take(self) -> Job | None:
        """The running job, if there is one (a restart resumes it), else the oldest queued one, now running.

        The first take by this process counts as an attempt. A job that MAX_CRASHES processes took and did
        not live to finish or `release` becomes quarantined instead.
        """
        while True:
            with self._transaction():
                row = self._db.execute(
                    "SELECT seq, job_id, attempts FROM jobs WHERE state IN ('running', 'queued') "
                    "ORDER BY state = 'queued', seq LIMIT 1"
                ).fetchone()
                if row is None:
                    return None
                job_id, is_new = row["job_id"], row["job_id"] not in self._taken
                quarantined = is_new and row["attempts"] >= MAX_CRASHES
                if quarantined:
                    self._db.execute(
                        "UPDATE jobs SET state = 'quarantined', ended_at = ?, error = ? WHERE job_id = ?",
                        (
                            time.time(),
                            f"the worker died {MAX_CRASHES} times while it trained this job",
                            job_id,
                        ),
                    )
                else:
                    self._db.execute(
                        "UPDATE jobs SET state = 'running', attempts = attempts + ?, "
                        "started_at = coalesce(started_at, ?) WHERE job_id = ?",
                        (is_new, time.time(), job_id),
                    )
                found = self._db.execute("SELECT body FROM requests WHERE seq = ?", (row["seq"],)).fetchone()
            info = self._changed(job_id)
            if not quarantined:
                self._taken.add(job_id)
                return Job(info, decode_request(found[0]))

    def release(self, job_id: str) -> None:
        """A clean stop: the job stays running for the next process, and this attempt does not count."""
        with self._transaction():
            if job_id in self._taken:
                self._db.execute("UPDATE jobs SET attempts = attempts - 1 WHERE job_id = ?", (job_id,))
        self._taken.discard(job_id)

    def record_step(self, job_id: str, steps_done: int, loss: float) -> None:
        """Step number `steps_done` (from 1) of the running job is in the weights; its loss was `loss`."""
        with self._transaction():
            before = read_job(self._db, job_id)
            assert before.state == "running", f"{job_id} is {before.state}"
            assert steps_done >= before.steps_done, f"{job_id}: step {steps_done} after {before.steps_done}"
            self._db.execute(
                "UPDATE jobs SET steps_done = ?, loss_first = coalesce(loss_first, ?), loss_last = ? "
                "WHERE job_id = ?",
                (steps_done, loss, loss, job_id),
            )
            self._db.execute(
                "INSERT OR REPLACE INTO losses (seq, step, loss) VALUES (?, ?, ?)",
                (before.seq, steps_done, loss),
            )
        self._changed(job_id)

    def finish(
        self,
        job_id: str,
        state: JobState,
        *,
        weight_version: int | None = None,
        error: str | None = None,
        traceback: str | None = None,
        notes: Iterable[str] = (),
    ) -> JobInfo:
        """Ends the running job. Ending it once more in the same state changes nothing."""
        assert state in ENDED_STATES, state
        with self._transaction():
            before = read_job(self._db, job_id)
            if before.state == state:
                return before
            assert before.state == "running", f"{job_id} is {before.state}"
            self._db.execute(
                "UPDATE jobs SET state = ?, ended_at = ?, weight_version = ?, error = ?, traceback = ?, "
                "notes = ?, cancel_requested = NULL WHERE job_id = ?",
                (
                    state, time.time(), weight_version, error, traceback,
                    json.dumps([*before.notes, *notes]), job_id,
                ),
            )  # fmt: skip
        return self._changed(job_id)

    def add_notes(self, job_id: str, notes: Iterable[str]) -> None:
        """What is there already is not said again: a job that is resumed comes here once more."""
        with self._transaction():
            before = read_job(self._db, job_id).notes
            if not (new := [note for note in notes if note not in before]):
                return
            self._db.execute(
                "UPDATE jobs SET notes = ? WHERE job_id = ?", (json.dumps([*before, *new]), job_id)
            )
        self._changed(job_id)

    def remember_examples(self, job_id: str, hashes: Iterable[bytes]) -> None:
        """`job_id` has trained the examples with these hashes."""
        with self._transaction():
            seq = read_job(self._db, job_id).seq
            self._db.executemany(
                "INSERT OR IGNORE INTO examples (hash, seq) VALUES (?, ?)", ((one, seq) for one in hashes)
            )

    # --- the checkpoint's side ---

    def mark_durable(self, applied_seq: int) -> Jobs:
        """Every applied job up to `applied_seq` is in the checkpoint on disk. Returns those that changed."""
        return self._set("state = 'durable'", "state = 'applied' AND seq <= ?", (applied_seq,))

    def reconcile(self, applied_seq: int, job_id: str | None = None, steps_done: int = 0) -> Jobs:
        """After a crash lost the live weights: the checkpoint holds every job up to `applied_seq`, and the
        first `steps_done` steps of `job_id`. Later jobs that had trained are queued again, in their order.

        Returns the jobs that changed. Their examples are forgotten as trained; attempts stay counted.
        """
        changed = self.mark_durable(applied_seq)
        lost = (
            "seq > ? AND job_id IS NOT ? AND "
            "(state IN ('applied', 'durable') OR (state = 'running' AND steps_done > 0))"
        )
        with self._transaction():
            for forget in ("losses", "examples"):
                self._db.execute(
                    f"DELETE FROM {forget} WHERE seq IN (SELECT seq FROM jobs WHERE {lost})",
                    (applied_seq, job_id),
                )
            if job_id is not None:
                seq = read_job(self._db, job_id).seq
                self._db.execute("DELETE FROM losses WHERE seq = ? AND step > ?", (seq, steps_done))
                # Its own examples, where it was applied after the commit: known, they would be skipped now.
                self._db.execute("DELETE FROM examples WHERE seq = ?", (seq,))
                last = self._db.execute(
                    "SELECT loss FROM losses WHERE seq = ? ORDER BY step DESC LIMIT 1", (seq,)
                )
                self._db.execute(
                    "UPDATE jobs SET state = 'running', steps_done = ?, loss_last = ?, ended_at = NULL, "
                    "weight_version = NULL WHERE seq = ? AND state IN ('applied', 'durable', 'running')",
                    (steps_done, next((row[0] for row in last), None), seq),
                )
        again = (
            "state = 'queued', steps_done = 0, loss_first = NULL, loss_last = NULL, started_at = NULL, "
            "ended_at = NULL, weight_version = NULL"
        )
        return [*changed, *self._set(again, lost, (applied_seq, job_id))]

    def note_undone(self, applied_seq: int, note: str) -> Jobs:
        """An older version was restored, which holds jobs up to `applied_seq` only: `note` says so in each
        later one that had trained. They are not trained again, unless someone sends them anew."""
        trained = "seq > ? AND state IN ('applied', 'durable')"
        with self._transaction():
            rows = self._db.execute(
                f"SELECT seq, job_id, notes FROM jobs WHERE {trained} ORDER BY seq", (applied_seq,)
            ).fetchall()
            for row in rows:
                notes = json.dumps([*json.loads(row["notes"]), note])
                self._db.execute("UPDATE jobs SET notes = ? WHERE seq = ?", (notes, row["seq"]))
                self._db.execute("DELETE FROM examples WHERE seq = ?", (row["seq"],))
        return [self._changed(row["job_id"]) for row in rows]

    # --- cancelling ---

    def cancel(self, job_id: str) -> JobInfo:
        """A queued job is cancelled at once; a running one is asked to stop (`is_cancel_requested`).

        Raises NotFound, and Conflict (409) where the job has ended.
        """
        with self._transaction():
            info = read_job(self._db, job_id)
            if info.state in ENDED_STATES:
                error = Conflict(f"job {job_id} has ended ({info.state})", code="job_ended")
                error.http_status = 409
                raise error
            self._db.execute(
                "UPDATE jobs SET state = 'cancelled', ended_at = ? WHERE job_id = ?"
                if info.state == "queued"
                else "UPDATE jobs SET cancel_requested = ? WHERE job_id = ?",
                (time.time(), job_id),
            )
        return self._changed(job_id)
