"""What is kept of batches: a row each with the exact request, and the hashes of its examples."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from apollo_curation.moments.moments import Moment
from apollo_curation.settings import TierName
from apollo_curation.store import Store
from apollo_ipc.errors import NotFound
from apollo_ipc.wire.requests import Example, TrainRequest

# prepared: written, perhaps sent; submitted: the server has answered with a job; refused: the server does not
# take it, and a batch without the refused example has replaced it (none where nothing was left).
BatchState = Literal["prepared", "submitted", "trained", "failed", "stopped", "refused", "undone"]
OPEN_STATES: tuple[BatchState, ...] = ("prepared", "submitted")


class Batch(msgspec.Struct, frozen=True):
    """Moments of one tier that become one training job. moment_ids: in the order of the job's examples.

    job_id: None until the server has answered; loss_first, loss_last: of the job's first and last step;
    weight_version: the first that holds all of it; error: why it failed or was stopped.
    """

    batch_id: str
    tier: TierName
    state: BatchState
    moment_ids: list[str]
    job_id: str | None
    created_at: float
    ended_at: float | None
    num_examples: int
    loss_first: float | None = None
    loss_last: float | None = None
    weight_version: int | None = None
    error: str | None = None
    num_skipped: int = 0  # examples that the worker had trained before
    steps_done: int = 0
    replaced_by: str | None = None  # of a refused one: the batch of what was left

    @property
    def is_open(self) -> bool:
        """Whether its end is not known yet."""
        return self.state in OPEN_STATES

    @property
    def num_trained(self) -> int:
        """Examples of which steps were done or may yet be done. One that was undone counts."""
        is_without_steps = self.state == "refused" or (
            self.state in ("failed", "stopped") and not self.steps_done
        )
        return 0 if is_without_steps else self.num_examples - self.num_skipped


def example_hash(example: Example) -> str:
    """Equal for examples of equal content, whichever moment they come from."""
    return blake2b(msgspec.json.encode(example, order="sorted"), digest_size=16).hexdigest()


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
CREATE TABLE IF NOT EXISTS batch_examples (
    hash TEXT NOT NULL,
    batch_id TEXT NOT NULL,
    PRIMARY KEY (hash, batch_id)
) WITHOUT ROWID;
"""


class BatchTable:
    """Rows; each method is one transaction, or part of the caller's."""

    def __init__(self, store: Store):
        self._store = store
        store.declare(SCHEMA)

    def add(self, tier: TierName, moments: list[Moment], request: TrainRequest, batch_id: str) -> Batch:
        """A prepared batch. moments: those of request.examples, in their order."""
        ids = [moment.moment_id for moment in moments]
        batch = Batch(batch_id, tier, "prepared", ids, None, time.time(), None, len(ids))
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*_columns(batch), msgspec.json.encode(batch), msgspec.json.encode(request)),
            )
            db.executemany(
                "INSERT OR IGNORE INTO batch_examples VALUES (?, ?)",
                [(example_hash(example), batch_id) for example in request.examples],
            )
        return batch

    def change(self, batch_id: str, **changes: Any) -> Batch:
        """The batch with `changes`. Raises NotFound."""
        with self._store.transaction() as db:
            batch = msgspec.structs.replace(self.get(batch_id), **changes)
            _, state, created_at, ended_at, num_trained = _columns(batch)
            db.execute(
                "UPDATE batches SET state = ?, created_at = ?, ended_at = ?, num_trained = ?, record = ? "
                "WHERE batch_id = ?",
                (state, created_at, ended_at, num_trained, msgspec.json.encode(batch), batch_id),
            )
        return batch

    def get(self, batch_id: str) -> Batch:
        """Raises NotFound."""
        rows = self._store.query("SELECT record FROM batches WHERE batch_id = ?", batch_id)
        if not rows:
            raise NotFound(f"no batch {batch_id!r}", field="BATCH_ID")
        return _decode(rows[0])

    def request(self, batch_id: str) -> TrainRequest:
        rows = self._store.query("SELECT request FROM batches WHERE batch_id = ?", batch_id)
        return msgspec.json.decode(rows[0]["request"], type=TrainRequest)

    def open(self) -> list[Batch]:
        rows = self._store.query(
            f"SELECT record FROM batches WHERE state IN ({_marks(OPEN_STATES)}) "
            "ORDER BY created_at, batch_id",
            *OPEN_STATES,
        )
        return [_decode(row) for row in rows]

    def num_trained(self, since: float) -> int:
        """Examples of the batches that ended at or after `since` or are under way (see Batch.num_trained)."""
        rows = self._store.query(
            "SELECT coalesce(sum(num_trained), 0) FROM batches WHERE ended_at IS NULL OR ended_at >= ?", since
        )
        return rows[0][0]

    def known_hashes(self) -> set[str]:
        """Hashes of all examples that are in the weights or on their way there."""
        states = ("trained", *OPEN_STATES)
        rows = self._store.query(
            "SELECT DISTINCT hash FROM batch_examples JOIN batches USING (batch_id) "
            f"WHERE state IN ({_marks(states)})",
            *states,
        )
        return {row[0] for row in rows}

    def list(self, since: float = 0.0) -> list[Batch]:
        rows = self._store.query(
            "SELECT record FROM batches WHERE created_at >= ? ORDER BY created_at, batch_id", since
        )
        return [_decode(row) for row in rows]


def new_batch_id() -> str:
    """Sortable by time, unique without asking anyone."""
    return f"batch-{time.time_ns() // 1_000_000:012x}-{secrets.token_hex(4)}"


def _columns(batch: Batch) -> tuple[str, str, float, float | None, int]:
    return (batch.batch_id, batch.state, batch.created_at, batch.ended_at, batch.num_trained)


def _decode(row: sqlite3.Row) -> Batch:
    return msgspec.json.decode(row["record"], type=Batch)


def _marks(values: Iterable[object]) -> str:
    return ", ".join("?" for _ in values)
