"""The outbox: state_dir/webhooks.sqlite. An event is in it, on disk, before anybody is told of it.

Any process of ours may add events; one sends them (webhooks.sender). An event that is added twice under one
id is one event, so whoever was killed between what happened and the outbox simply adds it again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from apollo_ipc.config import Config
from apollo_ipc.database import Database, DatabaseDamaged

EventType = Literal[
    "job.done", "job.failed", "job.quarantined", "step.mended", "sync.failed", "quality.breach", "ping"
]
SCHEMA_VERSION = 1
KEEP_S = 30 * 86400.0  # events that were sent, or given up

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    type TEXT NOT NULL,
    subject TEXT NOT NULL,
    body BLOB NOT NULL,
    created_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS deliveries (
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
CREATE INDEX IF NOT EXISTS waiting ON deliveries (url, subject, seq)
    WHERE sent_at IS NULL AND gave_up_at IS NULL;
CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS intents (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
"""
_WAITS = "d.sent_at IS NULL AND d.gave_up_at IS NULL"


class OutboxDamaged(DatabaseDamaged):
    code = "outbox_damaged"


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


class Outbox(Database):
    """urls: who is to be told of what is added. Raises OutboxDamaged."""

    schema_version = SCHEMA_VERSION
    schema = _SCHEMA
    damaged = OutboxDamaged
    advice = "move it away; what was not sent yet is lost with it"

    def __init__(self, path: Path, urls: Iterable[str]):
        super().__init__(path)
        self._urls = [*urls]

    # --- what happened ---

    def add(self, event: Event, now: float | None = None) -> bool:
        """False: an event with its id is there already."""
        with self.transaction() as db:
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
        with self.reading() as db:
            row = db.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def set_mark(self, name: str, value: float) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, value))

    def intent(self, name: str) -> bytes | None:
        """What somebody has begun, and told nobody of its end yet."""
        with self.reading() as db:
            row = db.execute("SELECT body FROM intents WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def set_intent(self, name: str, body: bytes | None) -> None:
        """None: it has ended."""
        with self.transaction() as db:
            db.execute("DELETE FROM intents WHERE name = ?", (name,))
            if body is not None:
                db.execute("INSERT INTO intents VALUES (?, ?)", (name, body))

    # --- sending ---

    def due(self, url: str, now: float) -> Waiting | None:
        """The oldest event for `url` that may be sent: the first that waits of its subject, and its time."""
        with self.reading() as db:
            row = db.execute(
                "SELECT e.seq, e.event_id, e.body, d.attempts, e.created_at FROM deliveries d "
                f"JOIN events e USING (seq) WHERE d.url = ?1 AND {_WAITS} AND d.next_at <= ?2 AND NOT EXISTS "
                "(SELECT 1 FROM deliveries p WHERE p.url = ?1 AND p.subject = d.subject AND p.seq < d.seq "
                "AND p.sent_at IS NULL AND p.gave_up_at IS NULL) ORDER BY d.seq LIMIT 1",
                (url, now),
            ).fetchone()
        return row and Waiting(*row)

    def note_sent(self, seq: int, url: str, now: float) -> None:
        with self.transaction() as db:
            db.execute(
                "UPDATE deliveries SET sent_at = ?, attempts = attempts + 1, error = NULL "
                "WHERE seq = ? AND url = ?",
                (now, seq, url),
            )

    def note_failed(self, seq: int, url: str, error: str, next_at: float | None, now: float) -> None:
        """next_at: when it is tried again; None: it is given up."""
        with self.transaction() as db:
            db.execute(
                "UPDATE deliveries SET attempts = attempts + 1, error = ?, next_at = coalesce(?, next_at), "
                "gave_up_at = ? WHERE seq = ? AND url = ?",
                (error, next_at, now if next_at is None else None, seq, url),
            )

    def forget(self, before: float) -> None:
        """Events that were added before then, and wait for nobody who is still to be told."""
        urls = json.dumps(self._urls)
        with self.transaction() as db:
            db.execute(
                "DELETE FROM events WHERE created_at < ? AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE "
                f"d.seq = events.seq AND {_WAITS} AND d.url IN (SELECT value FROM json_each(?)))",
                (before, urls),
            )
            db.execute("DELETE FROM deliveries WHERE seq NOT IN (SELECT seq FROM events)")

    # --- looking ---

    def deliveries(self, limit: int = 50) -> list[Delivery]:
        """Newest first."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT e.event_id, e.type, e.subject, d.url, e.created_at, d.attempts, d.sent_at, "
                "d.gave_up_at, d.next_at, d.error FROM deliveries d JOIN events e USING (seq) "
                "ORDER BY d.seq DESC, d.url LIMIT ?",
                (limit,),
            ).fetchall()
        return [Delivery(*row) for row in rows]
