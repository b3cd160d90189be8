"""The file behind JobQueue: how it is opened, its schema, and what a row means."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
from pathlib import Path

import msgspec

from apollo_ipc.config import make_private_dir
from apollo_ipc.errors import ApolloError
from apollo_ipc.wire.messages import JobInfo
from apollo_ipc.wire.requests import TrainRequest

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 10.0
MAX_VARIABLES = 500  # `?` in one statement; SQLite's own limit was 999 before 3.32

# `requests` apart from `jobs`: SQLite writes a changed row whole, and a body may have 32 MB.
# AUTOINCREMENT: a seq is never given twice.
SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    num_examples INTEGER NOT NULL,
    num_steps INTEGER NOT NULL,
    steps_done INTEGER NOT NULL DEFAULT 0,
    loss_first REAL,
    loss_last REAL,
    weight_version INTEGER,
    num_skipped INTEGER NOT NULL,
    idempotency_key TEXT UNIQUE,
    request_digest BLOB NOT NULL,
    error TEXT,
    traceback TEXT,
    notes TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    cancel_requested REAL
);
CREATE INDEX jobs_by_state ON jobs (state, seq);
CREATE TABLE requests (seq INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE losses (seq INTEGER, step INTEGER, loss REAL, PRIMARY KEY (seq, step)) WITHOUT ROWID;
CREATE TABLE examples (hash BLOB PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX examples_by_seq ON examples (seq);
"""

_FIELDS = [name for name in JobInfo.__struct_fields__ if name != "loss_history"]
JOB_COLUMNS = ", ".join(_FIELDS)

# Key order inside free-form parts (tools, tool_calls) must not make one body two.
_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(TrainRequest)


class QueueDamaged(ApolloError):
    """The queue's file cannot be used as it is; a person must decide."""

    code = "queue_damaged"
    exit_code = 78  # EX_CONFIG of sysexits.h: a supervisor must not loop on it


def connect(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """Usable from every thread, one at a time. busy_timeout_s: how long a write waits for another's."""
    db = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    return db


def open_file(path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """The queue's database, made (mode 0600) where there is none, checked and brought to this schema.

    Raises QueueDamaged where it is no database, damaged, or of a newer schema than this program knows.
    """
    make_private_dir(path.parent)
    # SQLite gives its -wal and -shm files the mode of the main file (os_unix.c, findCreateFileMode).
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    path.chmod(0o600)
    db = connect(path, busy_timeout_s)
    try:
        _prepare(db, path)
    except (
        sqlite3.OperationalError
    ):  # locked, disk full, no permission: says what it is, may be over next time
        db.close()
        raise
    except sqlite3.DatabaseError as error:
        db.close()
        raise QueueDamaged(
            f"{path} is damaged ({error}); the weights are not affected. Try `sqlite3 {path} .recover`, or "
            f"move the file away (mv {path} {path}.damaged) to start with an empty queue"
        ) from error
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)
    db.execute("BEGIN IMMEDIATE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise QueueDamaged(
            f"{path} has schema version {version}, this apollo-ipc knows {SCHEMA_VERSION}: a newer one wrote "
            "it. Install that one, or move the file away to start with an empty queue",
            code="queue_too_new",
        )
    if version == 0:
        for statement in SCHEMA.split(";\n"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute(f"PRAGMA application_id = {1 + secrets.randbelow(2**31 - 1)}")
    db.execute("COMMIT")


def job_info(row: sqlite3.Row) -> JobInfo:
    values = {name: row[name] for name in _FIELDS}
    values["notes"] = json.loads(values["notes"])
    return JobInfo(**values)


def encode_request(request: TrainRequest) -> tuple[bytes, bytes]:
    """The body as it is stored, and its digest (16 bytes)."""
    body = _encoder.encode(request)
    return body, hashlib.blake2b(body, digest_size=16).digest()


def decode_request(body: bytes) -> TrainRequest:
    return _decoder.decode(body)
