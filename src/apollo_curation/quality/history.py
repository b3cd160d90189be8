"""Every measurement, in curation's store."""

from __future__ import annotations

from typing import Literal

import msgspec

from apollo_curation.quality.canaries import CanaryResult
from apollo_curation.quality.measure import CategoryLoss, overall_loss
from apollo_curation.store import Store

# good: a person has accepted it as it is; scheduled: asked for beside training; restored: after a restore.
Label = Literal["before", "during", "after", "restored", "good", "scheduled"]
Action = Literal["stopped", "restoring", "restored", "not_restored"]


class Breach(msgspec.Struct, frozen=True):
    """A threshold that is broken. what: the category, or the canaries' names; before, now, limit: nats a
    token, or numbers of canaries or examples; before is None where there was nothing to compare with."""

    kind: Literal["loss", "not_a_number", "unmeasured", "canaries"]
    what: str
    before: float | None
    now: float | None
    limit: float
    sentence: str


class Measurement(msgspec.Struct, frozen=True):
    """at: seconds since the epoch, of its start. weight_version: served then, None where no worker told it;
    while a job trains the weights move on during the measurement. durable_version: of equal weights on disk.

    batch_ids: batches that ended or were under way since the measurement before; against: the id of the one
    it was compared with; action: what followed from its breaches; restored_version: brought back before it.
    """

    label: Label
    at: float
    duration_s: float
    weight_version: int | None
    losses: dict[str, CategoryLoss]
    canaries: list[CanaryResult]
    batch_ids: list[str] = []
    durable_version: int | None = None
    job_id: str | None = None
    against: int | None = None
    breaches: list[Breach] = []
    action: Action | None = None
    restored_version: int | None = None
    measurement_id: int = 0

    @property
    def ok(self) -> bool:
        return not self.breaches

    @property
    def is_good(self) -> bool:
        """Whether later ones may be held against it: taken at rest, and nothing broken or accepted so."""
        return self.label == "good" or (self.ok and self.label != "during")

    @property
    def loss(self) -> float | None:
        """Nats a token over all categories."""
        return overall_loss(self.losses)

    @property
    def num_passed(self) -> int:
        return sum(one.passed is True for one in self.canaries)

    @property
    def num_not_judged(self) -> int:
        return sum(one.passed is None for one in self.canaries)


SCHEMA = """
CREATE TABLE IF NOT EXISTS quality_measurements (
    measurement_id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    label TEXT NOT NULL,
    body BLOB NOT NULL
);
"""


class QualityHistory:
    def __init__(self, store: Store):
        self._store = store
        store.declare(SCHEMA)

    def add(self, measurement: Measurement) -> Measurement:
        """As it is kept, with its id."""
        with self._store.transaction() as db:
            row = db.execute(
                "INSERT INTO quality_measurements (at, label, body) VALUES (?, ?, ?)",
                (measurement.at, measurement.label, msgspec.json.encode(measurement)),
            )
            assert row.lastrowid is not None
            return self.replace(msgspec.structs.replace(measurement, measurement_id=row.lastrowid))

    def replace(self, measurement: Measurement) -> Measurement:
        with self._store.transaction() as db:
            db.execute(
                "UPDATE quality_measurements SET body = ? WHERE measurement_id = ?",
                (msgspec.json.encode(measurement), measurement.measurement_id),
            )
        return measurement

    def list(self, limit: int = -1) -> list[Measurement]:
        """The newest `limit`, the oldest of them first; all where it is negative."""
        rows = self._store.query(
            "SELECT body FROM quality_measurements ORDER BY measurement_id DESC LIMIT ?", limit
        )
        return [msgspec.json.decode(row["body"], type=Measurement) for row in reversed(rows)]

    def last_good(self) -> Measurement | None:
        return next((one for one in reversed(self.list()) if one.is_good), None)
