"""Teach jobs and lessons: an SQLite file in the state directory.

The routes and `apollo-ipc teach` put jobs in, one teacher process takes them on, phase by phase. Each change
is one IMMEDIATE transaction, flushed when it returns. Every method blocks: off the event loop.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_ipc.config import Config
from apollo_ipc.database import Database
from apollo_ipc.errors import Conflict, NotFound
from apollo_ipc.teaching.facts import Fact
from apollo_ipc.teaching.lessons import LESSON, Outcome, StoredLesson, lesson_in, settle

SCHEMA_VERSION = 3  # 2: jobs have a purpose, lessons the answers of before; 3: forms that the model wrote

Phase = Literal[
    "preparing", "training", "checking", "going back", "applied", "rolled back", "failed", "cancelled"
]
ENDED_PHASES = ("applied", "rolled back", "failed", "cancelled")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL, changed_at REAL NOT NULL, client_key TEXT UNIQUE, digest BLOB NOT NULL,
    request BLOB NOT NULL, phase TEXT NOT NULL, round INTEGER NOT NULL DEFAULT 0, material BLOB,
    is_cancelled INTEGER NOT NULL DEFAULT 0, report BLOB, error TEXT);
CREATE INDEX IF NOT EXISTS jobs_by_phase ON jobs (phase);
CREATE TABLE IF NOT EXISTS lessons (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    job TEXT NOT NULL, taught_at REAL NOT NULL, fact BLOB NOT NULL, former TEXT NOT NULL,
    rehearsed INTEGER NOT NULL DEFAULT 0, is_known INTEGER NOT NULL, asked_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS former_answers (lesson TEXT PRIMARY KEY, answers BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS written_forms (lesson TEXT PRIMARY KEY, forms BLOB NOT NULL);
"""


class TeachOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """None: the teacher's default. min_known: share of the examination that has to be right; max_rise: nats a
    token that the model's own earlier answers may lose; max_hits: share of near misses that may name a fact;
    rounds: training jobs at most; writer: who makes the forms of a fact, rules alone or the served model too;
    "auto": by what the model can do."""

    rounds: Annotated[int, Meta(ge=1, le=20)] | None = None
    lr: Annotated[float, Meta(gt=0, le=0.1)] | None = None
    min_known: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_rise: Annotated[float, Meta(ge=0)] | None = None
    max_hits: Annotated[float, Meta(ge=0, le=1)] | None = None
    writer: Literal["auto", "rules", "model"] | None = None


Purpose = Literal["teach", "forget", "examine"]


class TeachRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a teach job is about. notes: what its sender should know, as sentences of a document of which no
    fact was made; lessons: to forget or examine, of which `facts` are, in their order."""

    facts: list[Fact]
    options: TeachOptions = TeachOptions()
    notes: list[str] = []
    purpose: Purpose = "teach"
    lessons: list[str] = []


class TeachJob(msgspec.Struct, frozen=True):
    """material: what the teacher needs to go on, its own business; report: of an ended job."""

    id: str
    created_at: float
    changed_at: float
    request: TeachRequest
    phase: Phase
    round: int = 0
    material: bytes | None = None
    is_cancelled: bool = False
    report: dict[str, Any] | None = None
    error: str | None = None

    def shown(self) -> dict[str, Any]:
        """As every interface shows it."""
        return {
            "teach_id": self.id,
            "status": self.phase,
            "purpose": self.request.purpose,
            "created_at": self.created_at,
            "changed_at": self.changed_at,
            "num_facts": len(self.request.facts),
            "notes": self.request.notes,
            "round": self.round,
            "is_cancelled": self.is_cancelled,
            "report": self.report,
            "error": self.error,
        }


_ENDED = ", ".join("?" * len(ENDED_PHASES))
_JOB = "id, created_at, changed_at, request, phase, round, material, is_cancelled, report, error"


def store_path(config: Config) -> Path:
    return config.state_dir / "teaching.sqlite"


def teacher_lock(config: Config) -> Path:
    """Held by the process that takes jobs on: the teacher, or a command in its place."""
    return config.state_dir / "teacher.lock"


class TeachStore(Database):
    schema_version = SCHEMA_VERSION
    schema = _SCHEMA

    # --- jobs ---

    def admit(
        self, request: TeachRequest, digest: bytes, *, client_key: str | None, is_retry: bool = False
    ) -> TeachJob:
        """A new job, or the one that this key was sent for before; is_retry: or one of the same digest that
        has not ended. Durable when it returns.

        Raises Conflict where the key was used with another body.
        """
        with self.transaction() as db:
            if client_key is not None and (job := self.of_key(client_key, digest)) is not None:
                return job
            if is_retry:
                row = db.execute(
                    f"SELECT {_JOB} FROM jobs WHERE digest = ? AND phase NOT IN ({_ENDED}) ORDER BY seq",
                    (digest, *ENDED_PHASES),
                ).fetchone()
                if row is not None:
                    return _job(row)
            now, job_id = time.time(), f"teach-{secrets.token_hex(8)}"
            db.execute(
                "INSERT INTO jobs (id, created_at, changed_at, client_key, digest, request, phase) "
                "VALUES (?, ?, ?, ?, ?, ?, 'preparing')",
                (job_id, now, now, client_key, digest, msgspec.json.encode(request)),
            )
        return TeachJob(job_id, now, now, request, "preparing")

    def of_key(self, client_key: str, digest: bytes) -> TeachJob | None:
        """The job for which this key was sent. Raises Conflict where it was with another body."""
        found = self.query(f"SELECT {_JOB}, digest FROM jobs WHERE client_key = ?", client_key)
        if found and found[0]["digest"] != digest:
            raise Conflict(
                f"idempotency key {client_key!r} was used for {found[0]['id']} with another body",
                field="Idempotency-Key",
            )
        return _job(found[0]) if found else None

    def job(self, job_id: str) -> TeachJob:
        """Raises NotFound."""
        with self.reading() as db:
            row = db.execute(f"SELECT {_JOB} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise NotFound(f"no teach job {job_id!r}", field="teach_id")
        return _job(row)

    def jobs(self, limit: int = 50) -> list[TeachJob]:
        """The newest first."""
        with self.reading() as db:
            return [
                _job(r) for r in db.execute(f"SELECT {_JOB} FROM jobs ORDER BY seq DESC LIMIT ?", (limit,))
            ]

    def first_unfinished(self) -> TeachJob | None:
        """Jobs are taken on in the order in which they came."""
        with self.reading() as db:
            row = db.execute(
                f"SELECT {_JOB} FROM jobs WHERE phase NOT IN ({_ENDED}) ORDER BY seq LIMIT 1", ENDED_PHASES
            ).fetchone()
        return None if row is None else _job(row)

    def cancel(self, job_id: str) -> TeachJob:
        """The teacher sees it before its next step, and takes back what was trained. Raises NotFound, and
        Conflict where it has ended."""
        job = self.job(job_id)
        if job.phase in ENDED_PHASES:
            raise Conflict(f"teach job {job_id} has ended: {job.phase}", code="job_ended")
        with self.transaction() as db:
            db.execute("UPDATE jobs SET is_cancelled = 1 WHERE id = ?", (job_id,))
        return self.job(job_id)

    def advance(
        self,
        job: TeachJob,
        phase: Phase,
        *,
        round: int | None = None,
        material: bytes | None = None,
        report: dict[str, Any] | None = None,
        error: str | None = None,
        outcome: Outcome | None = None,
    ) -> TeachJob:
        """Leaves `job`'s phase, once: an assertion refuses it from any other than the stored one. An ended
        job's material goes. outcome: stored with it."""
        now = time.time()
        kept = None if phase in ENDED_PHASES else (material or job.material)
        with self.transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET phase = ?, round = ?, material = ?, report = ?, error = ?, changed_at = ? "
                "WHERE id = ? AND phase = ? AND round = ?",
                (
                    *(phase, job.round if round is None else round, kept),
                    *(None if report is None else msgspec.json.encode(report), error, now),
                    *(job.id, job.phase, job.round),
                ),
            )
            assert changed.rowcount == 1, f"{job.id} is not in phase {job.phase}, round {job.round} any more"
            if outcome is not None:
                settle(db, job.id, outcome, now)
        return self.job(job.id)

    # --- lessons ---

    def lessons(self) -> list[StoredLesson]:
        """In the order in which they were taught."""
        with self.reading() as db:
            return [lesson_in(row) for row in db.execute(f"SELECT {LESSON} FROM lessons ORDER BY seq")]

    def lessons_of(self, ids: Sequence[str]) -> list[StoredLesson]:
        """In this order, each once. Raises NotFound."""
        known = {one.id: one for one in self.lessons()}
        if missing := [one for one in ids if one not in known]:
            raise NotFound(f"no lesson {missing[0]!r}", field="lessons")
        return [known[one] for one in dict.fromkeys(ids)]

    def former_answers(self, lesson: str) -> bytes:
        """As Learned.answers; empty for a lesson of an older program."""
        found = self.query("SELECT answers FROM former_answers WHERE lesson = ?", lesson)
        return found[0]["answers"] if found else b""

    def written_forms(self, lesson: str) -> bytes:
        """As Learned.forms; empty where rules alone made them."""
        found = self.query("SELECT forms FROM written_forms WHERE lesson = ?", lesson)
        return found[0]["forms"] if found else b""

    def drop(self, ids: Sequence[str]) -> None:
        """These do not come back in later jobs; nothing is trained. Raises NotFound."""
        self.lessons_of(ids)
        with self.transaction() as db:
            settle(db, "", Outcome(forgotten=ids), time.time())


def request_about(
    lessons: Sequence[StoredLesson], purpose: Purpose, options: TeachOptions | None = None
) -> TeachRequest:
    """A job that asks for lessons, or takes them back."""
    facts, ids = [one.fact for one in lessons], [one.id for one in lessons]
    return TeachRequest(facts, options or TeachOptions(), purpose=purpose, lessons=ids)


def _job(row: sqlite3.Row) -> TeachJob:
    return TeachJob(
        row["id"],
        row["created_at"],
        row["changed_at"],
        msgspec.json.decode(row["request"], type=TeachRequest),
        row["phase"],
        row["round"],
        row["material"],
        bool(row["is_cancelled"]),
        None if row["report"] is None else msgspec.json.decode(row["report"]),
        row["error"],
    )
