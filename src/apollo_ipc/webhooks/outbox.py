"""The outbox: state_dir/webhooks.sqlite. An event is in it, on disk, before anybody is told of it.

Any process of ours may add events; one sends them (webhooks.sender). An event that is added twice under one
id is one event, so whoever was killed between what happened and the outbox simply adds it again.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from apollo_ipc.config import Config, make_private_dir
from apollo_ipc.errors import ApolloError

EventType = Literal[
    "job.done", "job.failed", "job.quarantined", "step.mended", "sync.failed", "quality.breach", "ping"
]
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 10.0
KEEP_S = 30 * 86400.0  # events that were sent, or given up

_SCHEMA = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    type TEXT NOT NULL,
    subject TEXT NOT NULL,
    body BLOB NOT NULL,
    created_at REAL NOT NULL
);
CREATE TABLE deliveries (
    seq INTEGER NOT NULL,
    url TEXT NOT NULL,
    subject TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    next_at REAL NOT NULL DEFAULT 0,
    sent_at REAL,
    gave_up_at REAL,
    error TEXT,
    PRIMARY KEY (seq, url)
) WITHOUT ROWID;
CREATE INDEX waiting ON deliveries (url, subject, seq) WHERE sent_at IS NULL AND gave_up_at IS NULL;
CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
"""
_WAITS = "d.sent_at IS NULL AND d.gave_up_at IS NULL"


class OutboxDamaged(ApolloError):
    code = "outbox_damaged"
    exit_code = 78  # EX_CONFIG of sysexits.h: a supervisor must not loop on it


class Event(msgspec.Struct, frozen=True):
    """subject: what it is about; events of one subject are sent in their order. body: JSON as it is sent."""

    event_id: str
    type: EventType
    subject: str
    body: bytes


class Waiting(msgspec.Struct, frozen=True):
    """An event that is due for a URL. attempts: that failed so far."""

    seq: int
    event_id: str
    body: bytes
    attempts: int
    created_at: float


class Delivery(msgspec.Struct, frozen=True):
    """An event and one URL, as people see it."""

    event_id: str
    type: str
    subject: str
    url: str
    created_at: float
    attempts: int
    sent_at: float | None = None
    gave_up_at: float | None = None
    next_at: float | None = None
    error: str | None = None


def event(
    type: EventType, subject: str, data: Mapping[str, Any], at: float, event_id: str | None = None
) -> Event:
    """at: when it happened, seconds since the epoch. event_id: a new one where it is left out."""
    told = {"type": type, "timestamp": datetime.fromtimestamp(at, UTC).isoformat(), "data": data}
    body = json.dumps(msgspec.to_builtins(told), ensure_ascii=False).encode()
    return Event(event_id or f"evt_{secrets.token_hex(16)}", type, subject, body)


def outbox_path(config: Config) -> Path:
    return config.state_dir / "webhooks.sqlite"


class Outbox:
    """Thread-safe; a commit is durable. urls: who is to be told of what is added. Raises OutboxDamaged."""

    def __init__(self, path: Path, urls: Iterable[str]):
        self._urls, self._lock = [*urls], threading.RLock()
        make_private_dir(path.parent)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._db = sqlite3.connect(path, BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        try:
            self._prepare(path)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, path: Path) -> None:
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            with self.changing() as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version > SCHEMA_VERSION:
                    raise OutboxDamaged(
                        f"{path} has schema version {version}, this apollo-ipc knows {SCHEMA_VERSION}"
                    )
                if version == 0:
                    for statement in _SCHEMA.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.OperationalError:
            raise  # locked, no permission, disk full: says what it is
        except sqlite3.DatabaseError as error:
            raise OutboxDamaged(
                f"{path} is damaged ({error}): move it away; what was not sent yet is lost with it"
            ) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction; also around several calls of this class."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    # --- what happened ---

    def add(self, event: Event, now: float | None = None) -> bool:
        """False: an event with its id is there already."""
        with self.changing() as db:
            row = db.execute(
                "INSERT OR IGNORE INTO events (event_id, type, subject, body, created_at) VALUES "
                "(?, ?, ?, ?, ?)",
                (*msgspec.structs.astuple(event), time.time() if now is None else now),
            )
            if not row.rowcount:
                return False
            db.executemany(
                "INSERT INTO deliveries (seq, url, subject) VALUES (?, ?, ?)",
                ((row.lastrowid, url, event.subject) for url in self._urls),
            )
            return True

    def mark(self, name: str) -> float | None:
        """How far a source of events was read, as `set_mark` says."""
        with self._lock:
            row = self._db.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def set_mark(self, name: str, value: float) -> None:
        with self.changing() as db:
            db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, value))

    # --- sending ---

    def due(self, url: str, now: float) -> Waiting | None:
        """The oldest event for `url` that may be sent: the first that waits of its subject, and its time."""
        with self._lock:
            row = self._db.execute(
                "SELECT e.seq, e.event_id, e.body, d.attempts, e.created_at FROM deliveries d "
                f"JOIN events e USING (seq) WHERE d.url = ?1 AND {_WAITS} AND d.next_at <= ?2 AND NOT EXISTS "
                "(SELECT 1 FROM deliveries p WHERE p.url = ?1 AND p.subject = d.subject AND p.seq < d.seq "
                "AND p.sent_at IS NULL AND p.gave_up_at IS NULL) ORDER BY d.seq LIMIT 1",
                (url, now),
            ).fetchone()
        return row and Waiting(*row)

    def note_sent(self, seq: int, url: str, now: float) -> None:
        with self.changing() as db:
            db.execute(
                "UPDATE deliveries SET sent_at = ?, attempts = attempts + 1, error = NULL "
                "WHERE seq = ? AND url = ?",
                (now, seq, url),
            )

    def note_failed(self, seq: int, url: str, error: str, next_at: float | None, now: float) -> None:
        """next_at: when it is tried again; None: it is given up."""
        with self.changing() as db:
            db.execute(
                "UPDATE deliveries SET attempts = attempts + 1, error = ?, next_at = coalesce(?, next_at), "
                "gave_up_at = ? WHERE seq = ? AND url = ?",
                (error, next_at, now if next_at is None else None, seq, url),
            )

    def forget(self, before: float) -> None:
        """Events that were added before then, and wait for nobody who is still to be told."""
        urls = json.dumps(self._urls)
        with self.changing() as db:
            db.execute(
                "DELETE FROM events WHERE created_at < ? AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE "
                f"d.seq = events.seq AND {_WAITS} AND d.url IN (SELECT value FROM json_each(?)))",
                (before, urls),
            )
            db.execute("DELETE FROM deliveries WHERE seq NOT IN (SELECT seq FROM events)")

    # --- looking ---

    def deliveries(self, limit: int = 50) -> list[Delivery]:
        """Newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT e.event_id, e.type, e.subject, d.url, e.created_at, d.attempts, d.sent_at, "
                "d.gave_up_at, d.next_at, d.error FROM deliveries d JOIN events e USING (seq) "
                "ORDER BY d.seq DESC, d.url LIMIT ?",
                (limit,),
            ).fetchall()
        return [Delivery(*row) for row in rows]
