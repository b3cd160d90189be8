"""The jobs: an SQLite file that survives whatever happens to this process. Each trains once, in its order.

    queued -> running -> applied -> durable        applied: in vLLM's memory; durable: on disk
       |         |-----> failed | cancelled   |--> undone by a restore
       |---------|-----> cancelled, quarantined    quarantined: killed the trainer MAX_CRASHES times

What is stored of a job is its plan (job_plan): made once, at submit, whatever the configuration is later. The
file holds the order: it refuses a second running job, and one that starts before an earlier one has ended.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from apollo_ipc.errors import Conflict, NotReady
from apollo_ipc.wire.replies import ENDED_STATES, JobInfo, JobState
from apollo_worker.jobs import checkpoint_side
from apollo_worker.jobs.job_plan import JobPlan, decode_plan, encode_plan
from apollo_worker.jobs.queue_file import BUSY_TIMEOUT_S, Jobs, QueueFile, count_of, job_of_key, read_job

MAX_CRASHES = 3


class Job(msgspec.Struct, frozen=True):
    """A job that was taken, with what to train on."""

    info: JobInfo
    plan: JobPlan


class UnplannedJob(msgspec.Struct, frozen=True):
    """A job of schema 1. request: the msgpack body that it was sent with; num_steps: as it was admitted."""

    job_id: str
    request: bytes
    num_steps: int


class JobQueue(QueueFile):
    """Thread-safe. max_queued: how many jobs may wait. The rest as QueueFile says.

    `on_change`, where set, is called with each changed job after the commit, in the thread that changed it:
    two threads' calls may arrive in either order.
    """

    def __init__(self, path: Path, max_queued: int, busy_timeout_s: float = BUSY_TIMEOUT_S):
        self.on_change: Callable[[JobInfo], None] | None = None
        super().__init__(path, busy_timeout_s)
        self._max_queued = max_queued
        self._taken: set[str] = set()  # jobs whose attempt by this process has been counted

    # --- accepting ---

    def submit(
        self,
        plan: JobPlan,
        digest: bytes,
        *,
        notes: Iterable[str] = (),
        idempotency_key: str | None = None,
    ) -> JobInfo:
        """Accepts a job and returns after the commit; the same key and digest (of what was sent) give the job
        of the first time. The job's examples count as known from now on.

        Raises Conflict (422: key used with another body), NotReady (code `queue_full`).
        """
        body = encode_plan(plan)
        # Sortable by time, unique without asking anyone.
        job_id = f"job-{time.time_ns() // 1_000_000:012x}-{secrets.token_hex(4)}"
        with self.changing() as db:
            if idempotency_key is not None and (known := job_of_key(db, idempotency_key, digest)):
                return known
            if (num_queued := count_of(db, "queued")) >= self._max_queued:
                raise NotReady(
                    f"{num_queued} jobs are waiting (limit worker.max_queued_jobs); send it again later",
                    code="queue_full",
                )
            cursor = db.execute(
                "INSERT INTO jobs (job_id, state, created_at, num_examples, num_steps, num_skipped, "
                "idempotency_key, request_digest, notes, loss) VALUES (?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job_id, time.time(), plan.num_examples, plan.num_steps, plan.num_skipped,
                    idempotency_key, digest, json.dumps(list(notes)), plan.objective.loss,
                ),
            )  # fmt: skip
            assert cursor.lastrowid is not None
            db.execute("INSERT INTO plans (seq, body) VALUES (?, ?)", (cursor.lastrowid, body))
            if plan.advantages:
                told = (cursor.lastrowid, json.dumps(plan.advantages))
                db.execute("INSERT INTO advantages (seq, body) VALUES (?, ?)", told)
            _claim(db, cursor.lastrowid, plan)
        return self._changed(job_id)

    # --- jobs of schema 1, which the front plans once it knows the model ---

    def unplanned(self) -> Sequence[UnplannedJob]:
        """In their order."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT job_id, body, num_steps FROM requests JOIN jobs USING (seq) WHERE seq NOT IN "
                "(SELECT seq FROM plans) ORDER BY seq"
            )
            return [UnplannedJob(*row) for row in rows]

    def set_plan(self, job_id: str, plan: JobPlan) -> None:
        with self.changing() as db:
            seq = read_job(db, job_id).seq
            db.execute("INSERT OR REPLACE INTO plans (seq, body) VALUES (?, ?)", (seq, encode_plan(plan)))
            db.execute("DELETE FROM requests WHERE seq = ?", (seq,))
            db.execute("UPDATE jobs SET num_steps = ? WHERE seq = ?", (plan.num_steps, seq))
            _claim(db, seq, plan)
        self._changed(job_id)

    def refuse_unplanned(self, job_id: str, error: str) -> None:
        """No plan can be made of it. One that has trained already keeps its state."""
        with self.changing() as db:
            db.execute("DELETE FROM requests WHERE seq = (SELECT seq FROM jobs WHERE job_id = ?)", (job_id,))
            db.execute(
                "UPDATE jobs SET state = 'failed', ended_at = ?, error = ? WHERE job_id = ? AND state IN "
                "('queued', 'running')",
                (time.time(), error, job_id),
            )
        self._changed(job_id)

    # --- training ---

    def take(self) -> Job | None:
        """The running job, if there is one (a restart resumes it), else the oldest queued one, now running.

        None where there is none, where its plan has still to be made (`unplanned`), or where it is paused.
        The first take by this process counts as an attempt until the job progresses further than where a
        trainer died of it. After MAX_CRASHES attempts without that, or with a plan that cannot be read, the
        job ends instead.
        """
        while True:
            with self.changing() as db:
                row = db.execute(
                    "SELECT seq, job_id, attempts, paused_at, steps_done, num_steps FROM jobs "
                    "WHERE state IN ('running', 'queued') ORDER BY state = 'queued', seq LIMIT 1"
                ).fetchone()
                if row is None or row["paused_at"] is not None:
                    return None
                found = db.execute("SELECT body FROM plans WHERE seq = ?", (row["seq"],)).fetchone()
                if (
                    found is None
                    and db.execute("SELECT 1 FROM requests WHERE seq = ?", (row["seq"],)).fetchone()
                ):
                    return None
                # One whose steps are all done has none left that a trainer could die in.
                job_id, has_steps = row["job_id"], row["steps_done"] < row["num_steps"]
                is_new = has_steps and job_id not in self._taken
                plan = decode_plan(found["body"]) if found else None
                if plan is None:
                    self._end(db, job_id, "failed", "its stored plan cannot be read; send the job again")
                elif is_new and row["attempts"] >= MAX_CRASHES:
                    message = f"the worker died {MAX_CRASHES} times while it trained this job"
                    self._end(db, job_id, "quarantined", message)
                    plan = None
                else:
                    db.execute(
                        "UPDATE jobs SET state = 'running', attempts = attempts + ?, "
                        "started_at = coalesce(started_at, ?) WHERE job_id = ?",
                        (is_new, time.time(), job_id),
                    )
            info = self._changed(job_id)
            if plan is not None:
                self._taken.add(job_id)
                return Job(info, plan)

    def release(self, job_id: str) -> None:
        """A clean stop: the job stays running for the next process, and this attempt does not count."""
        with self.changing() as db:
            if job_id in self._taken:
                db.execute("UPDATE jobs SET attempts = max(0, attempts - 1) WHERE job_id = ?", (job_id,))
        self._taken.discard(job_id)

    def blame(self, job_id: str, step: int) -> None:
        """A trainer died inside `step` of this job; `job_id` may be its end only."""
        with self.changing() as db:
            db.execute(
                "UPDATE jobs SET attempts = max(attempts, 1), blamed_step = max(blamed_step, ?1) "
                "WHERE substr(job_id, -length(?2)) = ?2 AND state IN ('queued', 'running')",
                (step, job_id),
            )

    def record_step(self, job_id: str, steps_done: int, loss: float) -> None:
        """Step number `steps_done` (from 1) of the running job is in the weights; its loss was `loss`."""
        with self.changing() as db:
            before = read_job(db, job_id)
            assert before.state == "running", f"{job_id} is {before.state}"
            assert steps_done >= before.steps_done, f"{job_id}: step {steps_done} after {before.steps_done}"
            db.execute(
                "UPDATE jobs SET steps_done = ?1, loss_first = coalesce(loss_first, ?2), loss_last = ?2, "
                "attempts = iif(?1 >= blamed_step, 0, attempts) WHERE job_id = ?3",
                (steps_done, loss, job_id),
            )
            db.execute(
                "INSERT OR REPLACE INTO losses (seq, step, loss) VALUES (?, ?, ?)",
                (before.seq, steps_done, loss),
            )
        self._changed(job_id)

    def note_text_loss(self, job_id: str, loss: float) -> None:
        """What `losses_before` shall say of it, also to the next process."""
        with self.changing() as db:
            seq = read_job(db, job_id).seq
            db.execute("INSERT OR REPLACE INTO losses (seq, step, loss) VALUES (?, 0, ?)", (seq, loss))

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
        with self.changing() as db:
            before = read_job(db, job_id)
            if before.state == state:
                return before
            assert before.state == "running", f"{job_id} is {before.state}"
            self._end(db, job_id, state, error)
            db.execute(
                "UPDATE jobs SET weight_version = ?, traceback = ?, notes = ?, attempts = 0, blamed_step = 0 "
                "WHERE job_id = ?",
                (weight_version, traceback, json.dumps([*before.notes, *notes]), job_id),
            )
        return self._changed(job_id)

    def add_notes(self, job_id: str, notes: Iterable[str]) -> None:
        """What is there already is not said again: a job that is resumed comes here once more."""
        with self.changing() as db:
            before = read_job(db, job_id).notes
            if not (new := [note for note in notes if note not in before]):
                return
            db.execute("UPDATE jobs SET notes = ? WHERE job_id = ?", (json.dumps([*before, *new]), job_id))
        self._changed(job_id)

    # --- the checkpoint's side ---

    def mark_durable(self, applied_seq: int) -> Jobs:
        """Every applied job up to `applied_seq` is in the checkpoint on disk. Returns those that changed."""
        with self.changing() as db:
            changed = checkpoint_side.mark_durable(db, applied_seq)
        return [self._changed(job_id) for job_id in changed]

    def reconcile(self, applied_seq: int, job_id: str | None = None, steps_done: int = 0) -> Jobs:
        """The weights are those of a checkpoint, which holds every job up to `applied_seq` and the first
        `steps_done` steps of `job_id`. Later jobs that had begun are queued again, in their order; one whose
        plan was forgotten is undone instead. Returns the jobs that changed. Idempotent, one transaction."""
        with self.changing() as db:
            changed = checkpoint_side.reconcile(db, applied_seq, job_id, steps_done)
        return [self._changed(one) for one in changed]

    def restored(self, held_seq: int, up_to_seq: int, weight_version: int, new_version: int) -> Jobs:
        """`weight_version` was restored, as `new_version`; its commit says `held_seq`. Of the jobs up to
        `up_to_seq` that had trained, those that it does not hold are `undone`: they are not trained again,
        unless someone sends them anew. Those that it holds, and an earlier restore had undone, are `durable`
        again. Returns the jobs that changed. Idempotent."""
        with self.changing() as db:
            changed = checkpoint_side.restored(db, held_seq, up_to_seq, weight_version, new_version)
        return [self._changed(job_id) for job_id in changed]

    def forget_plans(self, ended_before: float) -> int:
        """Drops the plans (the examples themselves) of jobs that ended before then (seconds since the epoch)
        and are not waiting for a sync; results and hashes stay. Returns how many."""
        old = "SELECT seq FROM jobs WHERE ended_at < ? AND state NOT IN ('queued', 'running', 'applied')"
        with self.changing() as db:
            db.execute(f"DELETE FROM requests WHERE seq IN ({old})", (ended_before,))
            db.execute(f"DELETE FROM reference_logprobs WHERE seq IN ({old})", (ended_before,))
            return db.execute(f"DELETE FROM plans WHERE seq IN ({old})", (ended_before,)).rowcount

    # --- pausing, cancelling ---

    def pause(self, job_id: str) -> JobInfo:
        """It is not trained any further until `resume`, after its present step where it runs. Jobs train in
        their order: those behind it wait, too. Raises NotFound; Conflict (409) where the job has ended."""
        with self.changing() as db:
            _require_open(db, job_id)
            db.execute(
                "UPDATE jobs SET paused_at = coalesce(paused_at, ?) WHERE job_id = ?", (time.time(), job_id)
            )
        return self._changed(job_id)

    def resume(self, job_id: str) -> JobInfo:
        """Changes nothing where the job is not paused. Raises like `pause`."""
        with self.changing() as db:
            _require_open(db, job_id)
            db.execute("UPDATE jobs SET paused_at = NULL WHERE job_id = ?", (job_id,))
        return self._changed(job_id)

    def cancel(self, job_id: str) -> JobInfo:
        """A queued job is cancelled at once; a running one is asked to stop (`is_cancel_requested`).

        Raises NotFound, and Conflict (409) where the job has ended.
        """
        with self.changing() as db:
            if _require_open(db, job_id).state == "queued":
                self._end(db, job_id, "cancelled")
            else:
                db.execute(
                    "UPDATE jobs SET cancel_requested = ?, paused_at = NULL WHERE job_id = ?",
                    (time.time(), job_id),
                )
        return self._changed(job_id)

    # --- inside ---

    def _changed(self, job_id: str) -> JobInfo:
        info = self.get(job_id)
        if self.on_change is not None:
            self.on_change(info)
        return info

    def _end(self, db: sqlite3.Connection, job_id: str, state: JobState, error: str | None = None) -> None:
        """What the job has not trained to its end is not known: sent again, it is trained."""
        assert state in ENDED_STATES, state
        db.execute(
            "UPDATE jobs SET state = ?, ended_at = ?, error = ?, cancel_requested = NULL, paused_at = NULL "
            "WHERE job_id = ?",
            (state, time.time(), error, job_id),
        )
        if state != "applied":
            db.execute("DELETE FROM examples WHERE seq = (SELECT seq FROM jobs WHERE job_id = ?)", (job_id,))


def _require_open(db: sqlite3.Connection, job_id: str) -> JobInfo:
    info = read_job(db, job_id)
    if info.state in ENDED_STATES:
        error = Conflict(f"job {job_id} has ended ({info.state})", code="job_ended")
        error.http_status = 409
        raise error
    return info


def _claim(db: sqlite3.Connection, seq: int, plan: JobPlan) -> None:
    hashes = ((one, seq) for one in plan.hashes_of(plan.num_steps))
    db.executemany("INSERT OR IGNORE INTO examples (hash, seq) VALUES (?, ?)", hashes)
