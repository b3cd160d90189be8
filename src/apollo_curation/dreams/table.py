"""What is kept of dreams: every one of them, step by step, and how far each seed has come."""

from __future__ import annotations

import time
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from apollo_curation.dreams.seeds import Seed
from apollo_curation.logs.conversation import Origin
from apollo_curation.store import Store
from apollo_ipc.errors import NotFound
from apollo_ipc.wire.requests import Message

# open: the next run goes on with it; good: answered well, not trained (yet); bad: answered badly when no
# round of training was left; failed: its training failed; dropped: a step of it got no usable answer.
DreamState = Literal["open", "good", "bad", "trained", "failed", "dropped"]

# held: answered well on enough novel variations in a row; given_up: all rounds of training did not get there.
SeedState = Literal["open", "held", "given_up"]


class Judged(msgspec.Struct, frozen=True):
    """The verdict on a response. confidence: 0 to 1."""

    good: bool
    reason: str
    confidence: float


class Dream(msgspec.Struct, frozen=True):
    """situation: without instructions, ends with the person; good: what a good response to it does; response:
    the learner's; is_cut_off: it reached dream.max_tokens; better: what is trained instead of a bad one;
    round: trainings on the seed before it.

    ancestors: dream ids, the oldest first; the last one is what this is a variation of.
    """

    seed_id: str
    situation: list[Message]
    lesson: str
    good: str
    topic: str
    source: Origin
    round: int = 0
    ancestors: list[str] = []
    response: Message | None = None
    is_cut_off: bool = False
    verdict: Judged | None = None
    better: Message | None = None
    moment_id: str | None = None
    batch_id: str | None = None
    state: DreamState = "open"
    reason: str = ""  # why it is bad, failed or dropped
    created_at: float = 0.0
    dream_id: str = ""
    position: int = 0  # in the order of dreaming

    @property
    def parent(self) -> str | None:
        return self.ancestors[-1] if self.ancestors else None

    @property
    def lineage(self) -> list[str]:
        """Seed, ancestors and the dream itself."""
        return [self.seed_id, *self.ancestors, self.dream_id]

    @property
    def learned(self) -> Message:
        """What is trained as the answer to the situation."""
        answer = self.better or self.response
        assert answer is not None
        return answer


class SeedRecord(msgspec.Struct, frozen=True):
    """since: position of the last dream that does not count any more: those before a seed was taken up again.
    reason: why it was left open or given up; empty where a run was cut off or nothing is wrong."""

    seed: Seed
    state: SeedState = "open"
    since: int = 0
    reason: str = ""
    updated_at: float = 0.0


SCHEMA = """
CREATE TABLE IF NOT EXISTS dream_seeds (
    seed_id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS dreams (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    dream_id TEXT NOT NULL UNIQUE,
    seed_id TEXT NOT NULL,
    state TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS dreams_by_seed ON dreams (seed_id, position);
CREATE INDEX IF NOT EXISTS dreams_by_state ON dreams (state, position);
"""


class Dreams:
    def __init__(self, store: Store):
        self._store = store
        store.declare(SCHEMA)

    def add(self, dream: Dream) -> Dream:
        """`dream` as it is now kept: with position, id and created_at. The same situation of the same seed
        may come again; it is another dream."""
        with self._store.transaction() as db:
            position = db.execute("SELECT coalesce(max(position), 0) + 1 FROM dreams").fetchone()[0]
            key = msgspec.json.encode([position, dream.seed_id, dream.situation], order="sorted")
            dream = msgspec.structs.replace(
                dream,
                position=position,
                dream_id="d-" + blake2b(key, digest_size=8).hexdigest(),
                created_at=dream.created_at or time.time(),
            )
            db.execute(
                "INSERT INTO dreams (position, dream_id, seed_id, state, body) VALUES (?, ?, ?, ?, ?)",
                (position, dream.dream_id, dream.seed_id, dream.state, msgspec.json.encode(dream)),
            )
        return dream

    def change(self, dream: Dream, **changes: Any) -> Dream:
        """`dream` with `changes`, kept."""
        dream = msgspec.structs.replace(dream, **changes)
        with self._store.transaction() as db:
            db.execute(
                "UPDATE dreams SET state = ?, body = ? WHERE dream_id = ?",
                (dream.state, msgspec.json.encode(dream), dream.dream_id),
            )
        return dream

    def of_seed(self, seed_id: str, since: int = 0) -> list[Dream]:
        """What was dreamt of a seed after position `since`, the oldest first."""
        return self._select("WHERE seed_id = ? AND position > ? ORDER BY position", seed_id, since)

    def get(self, dream_id: str) -> Dream:
        """Raises NotFound. A beginning that fits one dream only is enough."""
        found = self._select("WHERE dream_id >= ? AND dream_id < ?", dream_id, dream_id + "\U0010ffff")
        if len(found) != 1:
            raise NotFound(f"{'several dreams' if found else 'no dream'} {dream_id!r}", field="ID")
        return found[0]

    def seed(self, seed_id: str) -> SeedRecord | None:
        rows = self._store.query("SELECT body FROM dream_seeds WHERE seed_id = ?", seed_id)
        return msgspec.json.decode(rows[0]["body"], type=SeedRecord) if rows else None

    def keep_seed(self, record: SeedRecord) -> SeedRecord:
        record = msgspec.structs.replace(record, updated_at=time.time())
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO dream_seeds VALUES (?, ?, ?)",
                (record.seed.seed_id, record.state, msgspec.json.encode(record)),
            )
        return record

    def take_up_again(self, record: SeedRecord) -> SeedRecord:
        """A seed that was held or given up, open again: its earlier dreams count for novelty only."""
        rows = self._store.query("SELECT max(position) FROM dreams WHERE seed_id = ?", record.seed.seed_id)
        return self.keep_seed(SeedRecord(record.seed, since=rows[0][0] or 0))

    def seeds(self) -> dict[str, int]:
        """How many seeds are in each state."""
        rows = self._store.query("SELECT state, COUNT(*) FROM dream_seeds GROUP BY state ORDER BY state")
        return {row[0]: row[1] for row in rows}

    def _select(self, clause: str, *values: object) -> list[Dream]:
        rows = self._store.query(f"SELECT body FROM dreams {clause}", *values)
        return [msgspec.json.decode(row["body"], type=Dream) for row in rows]
