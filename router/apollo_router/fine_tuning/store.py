"""Uploaded files, and which job of the worker each fine-tuning job is: an SQLite file in the state directory.

Several API servers may have it open; each change is one IMMEDIATE transaction, flushed when it returns. Every
method blocks: off the event loop.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from pathlib import Path
from typing import Any

import msgspec

from apollo_ipc.config import Config
from apollo_ipc.database import Database
from apollo_ipc.errors import Conflict, NotFound, UserError

# For so long a request that its client sends once more is the same one: the SDK waits 8 s at most between
# two, and 10 minutes for an answer.
SAME_REQUEST_S = 20 * 60.0
MAX_STORED_BYTES = 1024 * 1024 * 1024  # all files together
SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    filename TEXT NOT NULL, num_bytes INTEGER NOT NULL, created_at REAL NOT NULL, expires_at REAL,
    digest BLOB NOT NULL, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL, digest BLOB NOT NULL, client_key TEXT UNIQUE, request BLOB NOT NULL,
    worker_job TEXT, error BLOB);
"""


class StoredFile(msgspec.Struct, frozen=True):
    """id: `file-...`; expires_at: None: when it is deleted. Times in seconds since the epoch."""

    id: str
    filename: str
    num_bytes: int
    created_at: float
    expires_at: float | None


class StoredJob(msgspec.Struct, frozen=True):
    """id: `ftjob-...`, and the idempotency key under which the worker takes it; request: as the client sent
    it (JSON); worker_job: None until the worker has accepted it; error: why it never will, if it refused."""

    id: str
    created_at: float
    request: dict[str, Any]
    worker_job: str | None = None
    error: dict[str, Any] | None = None


_FILE = "id, filename, num_bytes, created_at, expires_at"
_JOB = "id, created_at, request, worker_job, error"


def store_path(config: Config) -> Path:
    return config.state_dir / "fine_tuning.sqlite"


class FineTuningStore(Database):
    schema_version = SCHEMA_VERSION
    schema = _SCHEMA
    is_wiping = True  # files are other people's data

    # --- files ---

    def add_file(
        self, filename: str, content: bytes, digest: bytes, *, expires_s: float | None, is_retry: bool
    ) -> StoredFile:
        """Durable when it returns. is_retry: the file of the same digest, if one came within SAME_REQUEST_S.
        Raises UserError where all files together would be too large."""
        now = time.time()
        with self.transaction() as db:
            db.execute("DELETE FROM files WHERE expires_at <= ?", (now,))
            if is_retry:
                since = now - SAME_REQUEST_S
                row = db.execute(
                    f"SELECT {_FILE} FROM files WHERE digest = ? AND created_at >= ? ORDER BY seq DESC",
                    (digest, since),
                ).fetchone()
                if row is not None:
                    return StoredFile(**row)
            held = db.execute("SELECT coalesce(sum(num_bytes), 0) FROM files").fetchone()[0]
            if held + len(content) > MAX_STORED_BYTES:
                raise UserError(
                    f"all files may have {MAX_STORED_BYTES} bytes together, and {held} are held: delete some",
                    field="file",
                    code="files_full",
                )
            file = StoredFile(
                _new_id("file"), filename, len(content), now, None if expires_s is None else now + expires_s
            )
            db.execute(
                f"INSERT INTO files ({_FILE}, digest, content) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*msgspec.structs.astuple(file), digest, content),
            )
        return file

    def files(self) -> list[StoredFile]:
        """The newest first."""
        with self.reading() as db:
            rows = db.execute(
                f"SELECT {_FILE} FROM files WHERE coalesce(expires_at, 9e99) > ? ORDER BY seq DESC",
                (time.time(),),
            )
            return [StoredFile(**row) for row in rows]

    def file(self, file_id: str, field: str | None = None) -> StoredFile:
        """Raises NotFound."""
        return StoredFile(**self._file_row(_FILE, file_id, field))

    def content(self, file_id: str, field: str | None = None) -> bytes:
        """Raises NotFound."""
        return self._file_row("content", file_id, field)["content"]

    def delete_file(self, file_id: str) -> None:
        """Raises NotFound."""
        self.file(file_id)
        with self.transaction() as db:
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        # The write-ahead log would hold the deleted content for as long as nothing follows.
        self.query("PRAGMA wal_checkpoint(TRUNCATE)")

    def _file_row(self, columns: str, file_id: str, field: str | None) -> sqlite3.Row:
        with self.reading() as db:
            row = db.execute(
                f"SELECT {columns} FROM files WHERE id = ? AND coalesce(expires_at, 9e99) > ?",
                (file_id, time.time()),
            ).fetchone()
        if row is None:
            raise NotFound(f"no file {file_id!r}", field=field)
        return row

    # --- jobs ---

    def admit(
        self, request: dict[str, Any], digest: bytes, *, client_key: str | None, is_retry: bool
    ) -> StoredJob:
        """The job of this request, durable when it returns: a new one, or the one that it was sent for before
        (the same client_key; or is_retry, and the same digest within SAME_REQUEST_S).

        Raises Conflict where the key was used with another body.
        """
        now = time.time()
        with self.transaction() as db:
            if client_key is not None:
                row = db.execute(
                    f"SELECT {_JOB}, digest FROM jobs WHERE client_key = ?", (client_key,)
                ).fetchone()
                if row is not None and row["digest"] != digest:
                    raise Conflict(
                        f"idempotency key {client_key!r} was used for {row['id']} with another body",
                        field="Idempotency-Key",
                    )
            elif is_retry:
                row = db.execute(
                    f"SELECT {_JOB} FROM jobs WHERE digest = ? AND created_at >= ? ORDER BY seq DESC",
                    (digest, now - SAME_REQUEST_S),
                ).fetchone()
            else:
                row = None
            if row is not None:
                return _job(row)
            job = StoredJob(_new_id("ftjob"), now, request)
            db.execute(
                "INSERT INTO jobs (id, created_at, digest, client_key, request) VALUES (?, ?, ?, ?, ?)",
                (job.id, now, digest, client_key, msgspec.json.encode(request)),
            )
        return job

    def forget(self, job_id: str) -> bool:
        """A job that was never given to the worker. False where it has been, or was refused for good."""
        with self.transaction() as db:
            deleted = db.execute(
                "DELETE FROM jobs WHERE id = ? AND worker_job IS NULL AND error IS NULL", (job_id,)
            )
            return deleted.rowcount > 0

    def settle(
        self, job_id: str, *, worker_job: str | None = None, error: dict[str, Any] | None = None
    ) -> StoredJob:
        """The worker has accepted it, or refused it for good. Raises NotFound."""
        with self.transaction() as db:
            db.execute(
                "UPDATE jobs SET worker_job = ?, error = ? WHERE id = ?",
                (worker_job, None if error is None else msgspec.json.encode(error), job_id),
            )
        return self.job(job_id)

    def jobs(self) -> list[StoredJob]:
        """The newest first."""
        with self.reading() as db:
            return [_job(row) for row in db.execute(f"SELECT {_JOB} FROM jobs ORDER BY seq DESC")]

    def undelivered(self, older_than_s: float) -> list[StoredJob]:
        """Jobs of which the worker has not said yet whether it takes them; in their order."""
        with self.reading() as db:
            rows = db.execute(
                f"SELECT {_JOB} FROM jobs WHERE worker_job IS NULL AND error IS NULL AND created_at < ? "
                "ORDER BY seq",
                (time.time() - older_than_s,),
            )
            return [_job(row) for row in rows]

    def job(self, job_id: str) -> StoredJob:
        """Raises NotFound."""
        with self.reading() as db:
            row = db.execute(f"SELECT {_JOB} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise NotFound(f"no fine-tuning job {job_id!r}", field="fine_tuning_job_id")
        return _job(row)


def _job(row: sqlite3.Row) -> StoredJob:
    return StoredJob(
        row["id"],
        row["created_at"],
        msgspec.json.decode(row["request"]),
        row["worker_job"],
        None if row["error"] is None else msgspec.json.decode(row["error"]),
    )


def _new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
