"""The file behind JobQueue: how it is opened, changed and asked; what a row means.

Two processes have the file open: the front submits and cancels, the trainer does the rest. Every change is
one IMMEDIATE transaction; reads have a connection of their own and wait for no writer (WAL). A change returns
after its commit, and with synchronous=FULL a commit in WAL mode has been flushed (SQLite's "Write-Ahead
Logging" page, section "Performance Considerations").
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from apollo_ipc.config import make_private_dir
from apollo_ipc.errors import ApolloError, Conflict, NotFound, NotReady
from apollo_ipc.wire.replies import JobInfo, JobState
from apollo_worker.jobs.queue_schema import SCHEMA_VERSION, migrate

BUSY_TIMEOUT_S = 10.0
# Reading a whole file takes time, and each page is checked again when it is used.
MAX_CHECKED_BYTES = 16 * 1024 * 1024
MAX_VARIABLES = 500  # `?` in one statement; SQLite's own limit was 999 before 3.32

_FIELDS = [name for name in JobInfo.__struct_fields__ if name not in ("loss_history", "advantages")]
JOB_COLUMNS = ", ".join(_FIELDS)


class QueueDamaged(ApolloError):
    """The queue's file cannot be used as it is; a person must decide."""

    code = "queue_damaged"
    exit_code = 78  # EX_CONFIG of sysexits.h: a supervisor must not loop on it


Jobs = list[JobInfo]  # inside the class, `list` is its method


class QueueFile:
    """Thread-safe: one writer and one reader at a time. path: made (mode 0600) where there is none.

    busy_timeout_s: how long a change waits for another process's, before it raises NotReady (code `busy`).
    Raises QueueDamaged where the file is no database, damaged, or of a newer schema than this program knows;
    every later use may raise it too.
    """

    def __init__(self, path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S):
        self._path = path
        self._lock, self._reader_lock = threading.RLock(), threading.Lock()
        make_private_dir(path.parent)
        # SQLite gives its -wal and -shm files the mode of the main file (os_unix.c, findCreateFileMode).
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        path.chmod(0o600)
        self._db = _connect(path, busy_timeout_s)
        try:
            with self._damage_is_named():
                self._prepare()
            self._reader = _connect(path, busy_timeout_s)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        with self._lock, self._reader_lock:
            self._db.close()
            self._reader.close()

    @property
    def queue_id(self) -> int:
        """Tells this file from another one: a checkpoint's record of jobs is of one queue only."""
        with self.reading() as db:
            return db.execute("PRAGMA application_id").fetchone()[0]

    @contextmanager
    def changing(self) -> Generator[sqlite3.Connection]:
        """One transaction: commits at the end, rolls back on any exception. Its write lock is taken first."""
        with self._lock, self._damage_is_named():
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                raise NotReady("the trainer is writing to the queue; send it again", code="busy") from error
            try:
                yield self._db
                self._db.commit()  # may fail too: the disk is full
            except BaseException:
                self._db.rollback()
                raise

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection]:
        with self._reader_lock, self._damage_is_named():
            yield self._reader

    # --- what can be asked ---

    def get(self, job_id: str, with_history: bool = False) -> JobInfo:
        """Raises NotFound. `with_history` fills loss_history (one loss for each step done)."""
        with self.reading() as db:
            info = read_job(db, job_id)
            if not with_history:
                return info
            rows = db.execute("SELECT loss FROM losses WHERE seq = ? AND step > 0 ORDER BY step", (info.seq,))
            # SQLite stores NaN as NULL (its "Datatypes" page).
            history = [math.nan if row[0] is None else row[0] for row in rows]
            found = db.execute("SELECT body FROM advantages WHERE seq = ?", (info.seq,)).fetchone()
            advantages = found and json.loads(found[0])
        return msgspec.structs.replace(info, loss_history=history, advantages=advantages)

    def losses_before(self, job_id: str, limit: int = 64) -> tuple[Sequence[float], float | None]:
        """(the first losses of the last `limit` jobs before it that ended well, what `note_text_loss` noted).

        Raises NotFound."""
        with self.reading() as db:
            seq = read_job(db, job_id).seq
            first = db.execute(
                "SELECT loss_first FROM jobs WHERE seq < ? AND state IN ('applied', 'durable') "
                "AND loss_first IS NOT NULL AND loss = 'cross_entropy' ORDER BY seq DESC LIMIT ?",
                (seq, limit),
            )
            firsts = [row[0] for row in first]
            text = db.execute("SELECT loss FROM losses WHERE seq = ? AND step = 0", (seq,)).fetchone()
        return firsts, text and text[0]

    def count(self, state: JobState) -> int:
        with self.reading() as db:
            return count_of(db, state)

    def ids(self, state: JobState) -> set[str]:
        with self.reading() as db:
            return {row[0] for row in db.execute("SELECT job_id FROM jobs WHERE state = ?", (state,))}

    def list(self, limit: int = 50, state: JobState | None = None, before_seq: int | None = None) -> Jobs:
        """The newest `limit` jobs (of one state, older than `before_seq`, where given), newest first."""
        with self.reading() as db:
            rows = db.execute(
                f"SELECT {JOB_COLUMNS} FROM jobs WHERE (?1 IS NULL OR state = ?1) AND "
                "(?3 IS NULL OR seq < ?3) ORDER BY seq DESC LIMIT ?2",
                (state, max(0, limit), before_seq),
            )
            return [job_info(row) for row in rows]

    def is_cancel_requested(self, job_id: str) -> bool:
        """From the file, since the front is asked: some 10 us, so it may precede every step."""
        with self.reading() as db:
            row = db.execute("SELECT cancel_requested FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return row is not None and row[0] is not None

    def is_paused(self, job_id: str | None = None) -> bool:
        """Of this job, or of the one whose turn it is: the running one, or the oldest that is queued."""
        with self.reading() as db:
            row = db.execute(
                "SELECT paused_at FROM jobs WHERE state IN ('running', 'queued') AND (?1 IS NULL OR "
                "job_id = ?1) ORDER BY state = 'queued', seq LIMIT 1",
                (job_id,),
            ).fetchone()
        return row is not None and row[0] is not None

    def find_by_key(self, idempotency_key: str | None, digest: bytes) -> JobInfo | None:
        """The job accepted under this key, or None. Raises Conflict (422) where its body was another."""
        if idempotency_key is None:
            return None
        with self.reading() as db:
            return job_of_key(db, idempotency_key, digest)

    def known_examples(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Those of `hashes` that a job has trained, or is going to."""
        todo = [*dict.fromkeys(hashes)]
        known: set[bytes] = set()
        with self.reading() as db:
            for start in range(0, len(todo), MAX_VARIABLES):
                some = todo[start : start + MAX_VARIABLES]
                marks = ", ".join("?" * len(some))
                rows = db.execute(
                    f"SELECT DISTINCT hash FROM examples JOIN jobs USING (seq) WHERE hash IN ({marks}) "
                    "AND state != 'undone'",
                    some,
                )
                known.update(row[0] for row in rows)
        return known

    def applied_seq(self) -> int:
        """The highest seq such that it and every job before it has ended; 0 where there is none."""
        with self.reading() as db:
            return db.execute(
                "SELECT coalesce((SELECT min(seq) - 1 FROM jobs WHERE state IN ('queued', 'running')), "
                "(SELECT max(seq) FROM jobs), 0)"
            ).fetchone()[0]

    # --- inside ---

    @contextmanager
    def _damage_is_named(self) -> Generator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, ValueError, msgspec.ValidationError) as error:
            if not _is_damage(error):
                raise  # locked, disk full, no permission: says what it is, may be over next time
            raise QueueDamaged(
                f"{self._path} is damaged ({error}); the weights are not affected. Try `sqlite3 {self._path} "
                f".recover`, or move the file away (mv {self._path} {self._path}.damaged) to start with an "
                "empty queue"
            ) from error

    def _prepare(self) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if self._path.stat().st_size <= MAX_CHECKED_BYTES:
            problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise sqlite3.DatabaseError(problem)
        db.execute("BEGIN IMMEDIATE")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise QueueDamaged(
                f"{self._path} has schema version {version}, this apollo-ipc knows {SCHEMA_VERSION}: a newer "
                "one wrote it. Install that one, or move the file away to start with an empty queue",
                code="queue_too_new",
            )
        migrate(db, version)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")


def _is_damage(error: Exception) -> bool:
    if not isinstance(error, sqlite3.DatabaseError):
        return True  # what a row holds is no job
    if (code := getattr(error, "sqlite_errorcode", None)) is None:
        return type(error) is sqlite3.DatabaseError or "decode" in str(error)  # Python's own: not UTF-8
    # A statement of ours that is wrong for this file: its schema is not what its version says.
    is_foreign = code & 0xFF == sqlite3.SQLITE_ERROR and "no such" in str(error)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or is_foreign


def _connect(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    return db


def job_info(row: sqlite3.Row) -> JobInfo:
    """Raises ValueError or ValidationError where no program of ours wrote it."""
    values = {name: row[name] for name in _FIELDS}
    values["notes"] = json.loads(values["notes"])
    return msgspec.convert(values, JobInfo)


def read_job(db: sqlite3.Connection, job_id: str) -> JobInfo:
    """Raises NotFound."""
    row = db.execute(f"SELECT {JOB_COLUMNS} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(f"no job {job_id!r}")
    return job_info(row)


def count_of(db: sqlite3.Connection, state: JobState) -> int:
    return db.execute("SELECT count(*) FROM jobs WHERE state = ?", (state,)).fetchone()[0]


def job_of_key(db: sqlite3.Connection, key: str, digest: bytes) -> JobInfo | None:
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
