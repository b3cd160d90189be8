"""What is kept of batches: a row each, with the exact request and the job as it ended."""

from __future__ import annotations

import secrets
import sqlite3
import time
from typing import Any, Literal

import msgspec

from apollo_curation.moments.moments import Moment
from apollo_curation.settings import TierName
from apollo_curation.store import Store
from apollo_curation.training.replay import held_in, is_held
from apollo_ipc.errors import NotFound
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import TrainRequest

BatchState = Literal["open", "trained", "failed", "stopped", "undone"]


class TrainingBatch(msgspec.Struct, frozen=True):
    """Moments of one tier that become one training job.

    job: as it ended, None until then; error: why it failed or was stopped; num_held: the model's own answers
    that are held beside them; num_passes: how often each moment stands in the request.
    """

    batch_id: str
    tier: TierName
    state: BatchState
    moment_ids: list[str]
    created_at: float
    ended_at: float | None = None
    job: JobInfo | None = None
    error: str | None = None
    num_held: int = 0
    num_passes: int = 1

    @property
    def is_open(self) -> bool:
        """Whether its end is not known yet; only the server knows how far it is."""
        return self.state == "open"

    @property
    def num_trained(self) -> int:
        """Examples of which steps were done or may yet be done. One that was undone counts."""
        if self.state in ("failed", "stopped") and not (self.job and self.job.steps_done):
            return 0
        return len(self.moment_ids) - self.num_known

    @property
    def num_known(self) -> int:
        """Moments that the worker left out, having trained them before."""
        return self.job.num_skipped // self.num_passes if self.job else 0


# The last two lines take over what was written before only the server's states counted.
SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (
    batch_id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    ended_at REAL,
    num_trained INTEGER NOT NULL,
    record BLOB NOT NULL,
    request BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_by_time ON batches (created_at);
CREATE INDEX IF NOT EXISTS batches_by_state ON batches (state);
DELETE FROM batches WHERE state = 'refused';
UPDATE batches SET state = 'open', record = CAST(json_set(CAST(record AS TEXT), '$.state', 'open') AS BLOB)
    WHERE state IN ('prepared', 'submitted');
"""


class BatchTable:
    """Rows; each method is one transaction, or part of the caller's."""

    def __init__(self, store: Store):
        self._store = store
        store.declare(SCHEMA)

    def add(
        self, tier: TierName, moments: list[Moment], request: TrainRequest, batch_id: str
    ) -> TrainingBatch:
        """An open batch. moments: those of request.examples, each as often as any other."""
        ids = [moment.moment_id for moment in moments]
        batch = TrainingBatch(
            batch_id,
            tier,
            "open",
            ids,
            time.time(),
            num_held=len(held_in(request)),
            num_passes=sum(not is_held(one) for one in request.examples) // len(ids),
        )
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?)",
                (batch_id, *_columns(batch), msgspec.json.encode(batch), msgspec.json.encode(request)),
            )
        return batch

    def remove(self, batch_id: str) -> None:
        """One of which nothing was trained."""
        with self._store.transaction() as db:
            db.execute("DELETE FROM batches WHERE batch_id = ?", (batch_id,))

    def change(self, batch_id: str, **changes: Any) -> TrainingBatch:
        """The batch with `changes`. Raises NotFound."""
        with self._store.transaction() as db:
            batch = msgspec.structs.replace(self.get(batch_id), **changes)
            db.execute(
                "UPDATE batches SET state = ?, created_at = ?, ended_at = ?, num_trained = ?, record = ? "
                "WHERE batch_id = ?",
                (*_columns(batch), msgspec.json.encode(batch), batch_id),
            )
        return batch

    def get(self, batch_id: str) -> TrainingBatch:
        """Raises NotFound."""
        rows = self._store.query("SELECT record FROM batches WHERE batch_id = ?", batch_id)
        if not rows:
            raise NotFound(f"no batch {batch_id!r}", field="ID")
        return _decode(rows[0])

    def request(self, batch_id: str) -> TrainRequest:
        rows = self._store.query("SELECT request FROM batches WHERE batch_id = ?", batch_id)
        return msgspec.json.decode(rows[0]["request"], type=TrainRequest)

    def forget_requests(self, ended_before: float) -> list[str]:
        """Drops the requests of batches that ended before then (seconds since the epoch); what became of them
        stays. Returns their ids."""
        old = "WHERE ended_at < ? AND length(request) > 0"
        with self._store.transaction() as db:
            rows = db.execute(f"SELECT batch_id FROM batches {old}", (ended_before,)).fetchall()
            db.execute(f"UPDATE batches SET request = x'' {old}", (ended_before,))
        return [row["batch_id"] for row in rows]

    def open(self) -> list[TrainingBatch]:
        """The oldest first, as in `list`."""
        return self._select("WHERE state = 'open'")

    def list(self, since: float = 0.0) -> list[TrainingBatch]:
        return self._select("WHERE created_at >= ?", since)

    def num_trained(self, since: float) -> int:
        """Examples (TrainingBatch.num_trained) of batches that ended at or after `since` or are under way."""
        rows = self._store.query(
            "SELECT coalesce(sum(num_trained), 0) FROM batches WHERE ended_at IS NULL OR ended_at >= ?", since
        )
        return rows[0][0]

    def _select(self, where: str, *values: object) -> list[TrainingBatch]:
        rows = self._store.query(f"SELECT record FROM batches {where} ORDER BY created_at, batch_id", *values)
        return [_decode(row) for row in rows]


def new_batch_id() -> str:
    """Sortable by time, unique without asking anyone."""
    return f"batch-{time.time_ns() // 1_000_000:012x}-{secrets.token_hex(4)}"


def _columns(batch: TrainingBatch) -> tuple[str, float, float | None, int]:
    return batch.state, batch.created_at, batch.ended_at, batch.num_trained


def _decode(row: sqlite3.Row) -> TrainingBatch:
    return msgspec.json.decode(row["record"], type=TrainingBatch)
