"""Sessions, models, and what was asked of them, in order: an SQLite file in the state directory.

A future is a row: it is answered whoever has died since it was promised. Every method blocks: off the event
loop. One API server has it open.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from apollo_ipc.config import Config
from apollo_ipc.database import Database
from apollo_ipc.errors import NotFound, UserError

LEASE_S = 60.0  # the SDK says every 10 s that it is there
KEPT_S = 24 * 3600.0  # how long an answer can be had
CLIENT_KEPT_S = 30 * 86400.0  # and what a session was, after it was last seen
SCHEMA_VERSION = 1

# is_open: a forward_backward whose optim_step has not been.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, created_at REAL NOT NULL, seen_at REAL NOT NULL,
    has_ended INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS models (id TEXT PRIMARY KEY, session_id TEXT NOT NULL, created_at REAL NOT NULL,
    user_metadata BLOB, is_owner INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS requests (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    scope TEXT NOT NULL, seq_id INTEGER NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL,
    created_at REAL NOT NULL, state TEXT NOT NULL DEFAULT 'waiting', is_open INTEGER NOT NULL DEFAULT 0,
    result BLOB, UNIQUE (scope, seq_id));
CREATE INDEX IF NOT EXISTS waiting ON requests (state, seq);
CREATE TABLE IF NOT EXISTS samplers (id TEXT PRIMARY KEY, kind TEXT NOT NULL,
    weight_version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS saved (path TEXT PRIMARY KEY, weight_version INTEGER NOT NULL,
    created_at REAL NOT NULL);
"""

State = Literal["waiting", "done", "failed"]
SamplerKind = Literal["snapshot", "inflight"]


class QueuedCall(msgspec.Struct, frozen=True):
    """A request of a training client. scope: its model, or its session where it makes a model; body: JSON,
    of forward_backward protobuf; result: JSON, or protobuf where `kind` is forward_backward."""

    seq: int
    id: str
    scope: str
    kind: str
    body: bytes
    state: State = "waiting"
    result: bytes | None = None


class Sampler(msgspec.Struct, frozen=True):
    id: str
    kind: SamplerKind
    weight_version: int


_ASKED = "seq, id, scope, kind, body, state, result"


def store_path(config: Config) -> Path:
    return config.state_dir / "tinker.sqlite"


class TinkerStore(Database):
    schema_version = SCHEMA_VERSION
    schema = _SCHEMA
    is_wiping = True  # what is trained is other people's data

    # --- who ---

    def add_session(self) -> str:
        now, session_id = time.time(), f"session-{secrets.token_hex(8)}"
        with self.transaction() as db:
            _prune(db, now)
            db.execute("INSERT INTO sessions VALUES (?, ?, ?, 0)", (session_id, now, now))
        return session_id

    def see_session(self, session_id: str) -> bool:
        """It is alive. False: there is none, or it has ended."""
        with self.transaction() as db:
            seen = db.execute(
                "UPDATE sessions SET seen_at = ? WHERE id = ? AND NOT has_ended", (time.time(), session_id)
            )
            return seen.rowcount > 0

    def end_session(self, session_id: str) -> None:
        with self.transaction() as db:
            db.execute("UPDATE sessions SET has_ended = 1 WHERE id = ?", (session_id,))
            db.execute("UPDATE models SET is_owner = 0 WHERE session_id = ?", (session_id,))

    def take_lease(self, model_id: str, session_id: str, user_metadata: Any) -> None:
        """The model trains the weights from now on. Raises UserError while another one's lease runs."""
        now = time.time()
        with self.transaction() as db:
            if not self.see_session(session_id):
                raise NotFound(f"session {session_id!r} has ended, or never was", field="session_id")
            owner = db.execute(
                "SELECT models.id, sessions.seen_at FROM models JOIN sessions ON sessions.id = session_id "
                "WHERE is_owner AND models.id != ?",
                (model_id,),
            ).fetchone()
            if owner is not None and (left_s := owner["seen_at"] + LEASE_S - now) > 0:
                raise UserError(
                    f"the one copy of the weights is being trained by {owner['id']}: close its client, "
                    f"or wait until its lease ends, {left_s:.0f} s from now if its program has ended"
                )
            db.execute("UPDATE models SET is_owner = 0")
            db.execute(
                "INSERT OR IGNORE INTO models VALUES (?, ?, ?, ?, 1)",
                (model_id, session_id, now, msgspec.json.encode(user_metadata)),
            )
            db.execute("UPDATE models SET is_owner = 1 WHERE id = ?", (model_id,))

    def require_owner(self, model_id: str) -> None:
        """Raises UserError."""
        row = self.model(model_id)
        if not row["is_owner"]:
            raise UserError(
                f"{model_id} trains no longer: its session ended, or another one took the weights"
            )

    def model(self, model_id: str) -> sqlite3.Row:
        """Raises NotFound."""
        rows = self.query("SELECT * FROM models WHERE id = ?", model_id)
        if not rows:
            raise NotFound(f"no model {model_id!r}", field="model_id")
        return rows[0]

    # --- what was asked ---

    def ask(self, scope: str, seq_id: int, kind: str, body: bytes, *, is_open: bool = False) -> str:
        """The request's id; durable when it returns. The same scope and number is the same request."""
        with self.transaction() as db:
            row = db.execute(
                "SELECT id FROM requests WHERE scope = ? AND seq_id = ?", (scope, seq_id)
            ).fetchone()
            if row is not None:
                return row["id"]
            request_id = f"req-{secrets.token_hex(12)}"
            db.execute(
                "INSERT INTO requests (id, scope, seq_id, kind, body, created_at, is_open) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (request_id, scope, seq_id, kind, body, time.time(), is_open),
            )
        return request_id

    def next_waiting(self) -> QueuedCall | None:
        rows = self.query(f"SELECT {_ASKED} FROM requests WHERE state = 'waiting' ORDER BY seq LIMIT 1")
        return QueuedCall(**rows[0]) if rows else None

    def asked(self, request_id: str) -> QueuedCall | None:
        rows = self.query(f"SELECT {_ASKED} FROM requests WHERE id = ?", request_id)
        return QueuedCall(**rows[0]) if rows else None

    def settle(self, request: QueuedCall, state: State, result: bytes, *, is_closing: bool = False) -> None:
        """is_closing: the forward_backwards before it are used up, or given up; what they sent leaves the
        disk."""
        with self.transaction() as db:
            db.execute(
                "UPDATE requests SET state = ?, result = ? WHERE seq = ?", (state, result, request.seq)
            )
            if is_closing:
                _prune(db, time.time())
                db.execute(
                    "UPDATE requests SET is_open = 0, body = x'' WHERE scope = ? AND is_open AND seq < ?",
                    (request.scope, request.seq),
                )
            db.execute("UPDATE requests SET body = x'' WHERE seq = ? AND NOT is_open", (request.seq,))

    def open_before(self, request: QueuedCall) -> list[QueuedCall]:
        """The forward_backwards that an optim_step steps on, in order."""
        rows = self.query(
            f"SELECT {_ASKED} FROM requests WHERE scope = ? AND is_open AND seq < ? ORDER BY seq",
            request.scope,
            request.seq,
        )
        return [QueuedCall(**row) for row in rows]

    def has_stepped(self, scope: str) -> bool:
        return bool(
            self.query(
                "SELECT 1 FROM requests WHERE scope = ? AND kind = 'optim_step' AND state = 'done' LIMIT 1",
                scope,
            )
        )

    # --- what was kept ---

    def add_sampler(self, sampler_id: str, kind: SamplerKind, weight_version: int) -> None:
        """Of an id that is there already, nothing changes: it is bound to the version that it had."""
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO samplers VALUES (?, ?, ?)", (sampler_id, kind, weight_version))

    def sampler(self, sampler_id: str) -> Sampler:
        """Raises NotFound."""
        rows = self.query("SELECT * FROM samplers WHERE id = ?", sampler_id)
        if not rows:
            raise NotFound(f"no sampling session {sampler_id!r}", field="sampling_session_id")
        return Sampler(**rows[0])

    def save(self, path: str, weight_version: int) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO saved VALUES (?, ?, ?)", (path, weight_version, time.time()))

    def saved_version(self, path: str) -> int:
        """Raises NotFound."""
        rows = self.query("SELECT weight_version FROM saved WHERE path = ?", path)
        if not rows:
            raise NotFound(f"nothing was saved as {path!r}", field="path")
        return rows[0]["weight_version"]


def _prune(db: sqlite3.Connection, now: float) -> None:
    """Answers that can be had no longer, and clients of long ago. An optim_step stays with its model
    and tells that it has stepped."""
    db.execute(
        "DELETE FROM requests WHERE state != 'waiting' AND NOT is_open AND created_at < ? "
        "AND (kind != 'optim_step' OR scope NOT IN (SELECT id FROM models))",
        (now - KEPT_S,),
    )
    gone = "SELECT id FROM sessions WHERE seen_at < ?"
    db.execute(f"DELETE FROM models WHERE NOT is_owner AND session_id IN ({gone})", (now - CLIENT_KEPT_S,))
    db.execute(
        "DELETE FROM sessions WHERE seen_at < ? AND id NOT IN (SELECT session_id FROM models)",
        (now - CLIENT_KEPT_S,),
    )
