"""Moments worth learning: what was noticed, what would be learned from it, and how far that has come.

flagged -> approved -> training -> trained
        -> rejected             -> undone    its effect was taken back; never trained again by itself
        -> dropped              -> failed    the job failed; a person may approve it again
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from apollo_curation.logs.conversation import Origin
from apollo_curation.settings import TierName
from apollo_curation.store import Store
from apollo_ipc.errors import NotFound, UserError
from apollo_ipc.wire.requests import Example, Message

Kind = Literal["correction", "error_then_fix", "praise", "wrong_refusal", "behaviour", "dream"]
State = Literal["flagged", "approved", "rejected", "dropped", "training", "trained", "undone", "failed"]
DecidedBy = Literal["rule", "judge", "person", "auto", "hindsight"]
REACTIONS: tuple[Kind, ...] = ("correction", "praise", "wrong_refusal")  # they rest on what a user said next


class Hindsight(msgspec.Struct, frozen=True):
    """What the served model made of the user's next message (moments/hindsight). can_tell: false where its
    calibration says that it cannot; else probability, 0 to 1, with its 95 % interval low to high, that the
    message spoke as the moment's kind says: against the answer, or, of praise, for it. nats: the difference a
    token that it comes from."""

    model: str
    can_tell: bool = False
    probability: float | None = None
    low: float | None = None
    high: float | None = None
    nats: float | None = None
    num_tokens: int = 0
    sentence: str = ""
    better_nats: float | None = None  # likewise of the better answer (hindsight/better.py)


class Moment(msgspec.Struct, frozen=True):
    """context: the segment that leads to the decision, stripped; answer: what shall be learned, None while
    nobody has proposed it; original: what the model said then, where that differs; aftermath: what followed,
    for the judge and for a person, never trained.

    confidence: 0 to 1; surprise: nats a token of `answer` without the removed instructions, None while not
    measured; stripped: hashes of what was removed; lineage: of a dream, the ids of its ancestors.
    forgotten: digest of what was trained, where its texts were dropped after their time.
    """

    kind: Kind
    tier: TierName
    context: list[Message]
    answer: Message | None
    source: Origin
    topic: str
    reason: str
    confidence: float
    tools: list[dict[str, Any]] | None = None
    original: Message | None = None
    aftermath: list[Message] = []
    stripped: list[str] = []
    lineage: list[str] = []
    surprise: float | None = None
    state: State = "flagged"
    decided_by: DecidedBy = "rule"
    decided_reason: str = ""
    num_judged: int = 0  # times that the judge was asked
    batch_id: str | None = None
    created_at: float = 0.0
    moment_id: str = ""
    hindsight: Hindsight | None = None
    is_told: bool = False  # somebody said it outright (POST /feedback): nothing has to be guessed
    forgotten: str = ""

    @property
    def is_candidate(self) -> bool:
        """Noticed by a rule in what a user said, and not scored by hindsight yet."""
        return self.kind in REACTIONS and not self.is_told and self.hindsight is None

    @property
    def why(self) -> str:
        """In words: what was noticed, what hindsight said, and who decided for what reason."""
        parts = [self.reason or "Dreamt."]
        if self.hindsight is not None:
            parts.append(self.hindsight.sentence)
        elif self.is_candidate:
            parts.append("A candidate: the served model has not scored the next message yet.")
        if self.decided_reason:
            parts.append(f"Decided by {self.decided_by}: {self.decided_reason}")
        return " ".join(part if part.endswith((".", "!", "?", ")")) else f"{part}." for part in parts)

    @property
    def moves_away(self) -> bool:
        """A correction without a better answer: trained is that the wrong one becomes less likely."""
        return (
            self.answer is None
            and self.kind == "correction"
            and bool(self.original and self.original.content)
        )

    @property
    def teaches(self) -> bool:
        return self.answer is not None or self.moves_away

    def example(self) -> Example:
        """What is trained: the loss is taken of the answer alone; of the wrong one, labelled bad (KTO), where
        there is no better one. `teaches` must hold."""
        context = [without_weight(message) for message in self.context]
        if self.moves_away:
            assert self.original is not None
            wrong = msgspec.structs.replace(self.original, weight=None)
            return Example(messages=[*context, wrong], tools=self.tools, label=False)
        assert self.answer is not None
        return Example(messages=[*context, self.answer], tools=self.tools)

    @property
    def digest(self) -> str:
        """Of what is trained. `teaches` must hold, or have held before the texts were forgotten."""
        return self.forgotten or example_digest(self.example())

    def without_texts(self) -> Moment:
        """As it is kept when its time is over: no text of the conversation, and still found by its id where
        the same log is read again."""
        digest = self.digest if self.teaches else "nothing was to be learned"
        return msgspec.structs.replace(
            self, context=[], answer=None, original=None, aftermath=[], tools=None, forgotten=digest
        )


def example_digest(example: Example) -> str:
    """Equal for examples of equal content, whichever moment they come from."""
    return blake2b(msgspec.json.encode(example, order="sorted"), digest_size=16).hexdigest()


def without_weight(message: Message) -> Message:
    """An assistant turn of the context: seen, not learned."""
    return msgspec.structs.replace(message, weight=0) if message.role == "assistant" else message


def identify(moment: Moment) -> str:
    """The id of a moment: equal for the same decision, so that a log read twice gives it once."""
    decision = [moment.context, moment.original or moment.answer, moment.kind == "dream"]
    return "m-" + blake2b(msgspec.json.encode(decision, order="sorted"), digest_size=10).hexdigest()


SCHEMA = """
CREATE TABLE IF NOT EXISTS moments (
    moment_id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    tier TEXT NOT NULL,
    batch_id TEXT,
    created_at REAL NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS moments_by_state ON moments (state, created_at);
CREATE INDEX IF NOT EXISTS moments_by_batch ON moments (batch_id);
"""


class Moments:
    def __init__(self, store: Store):
        self._store = store
        store.declare(SCHEMA)

    def add(self, moments: Iterable[Moment]) -> list[Moment]:
        """Those that were not known yet, as they are now kept (with id and created_at)."""
        added = []
        with self._store.transaction() as db:
            for moment in moments:
                kept = msgspec.structs.replace(
                    moment, moment_id=identify(moment), created_at=moment.created_at or time.time()
                )
                values = (kept.moment_id, kept.state, kept.tier, kept.batch_id, kept.created_at)
                row = db.execute(
                    "INSERT OR IGNORE INTO moments VALUES (?, ?, ?, ?, ?, ?)", (*values, _encode(kept))
                )
                if row.rowcount:
                    added.append(kept)
        return added

    def get(self, moment_id: str) -> Moment:
        """Raises NotFound. A beginning that fits one moment only is enough."""
        found = self._select("WHERE moment_id >= ? AND moment_id < ?", moment_id, moment_id + "\U0010ffff")
        exact = [moment for moment in found if moment.moment_id == moment_id] or found
        if len(exact) != 1:
            raise NotFound(f"{'several moments' if exact else 'no moment'} {moment_id!r}", field="MOMENT_ID")
        return exact[0]

    def list(self, *states: State, tier: TierName | None = None, limit: int = -1) -> list[Moment]:
        """The oldest first; all states where none is given."""
        marks = ", ".join("?" * len(states))
        where = [f"state IN ({marks})"] if states else []
        where += ["tier = ?"] if tier else []
        clause = f"WHERE {' AND '.join(where)}" if where else ""
        values = [*states, *([tier] if tier else [])]
        return self._select(f"{clause} ORDER BY created_at, moment_id LIMIT ?", *values, limit)

    def of_batch(self, batch_id: str) -> list[Moment]:
        return self._select("WHERE batch_id = ? ORDER BY created_at, moment_id", batch_id)

    def set_aside(self, created_before: float) -> list[Moment]:
        """Those that were rejected or dropped and that are older, with their texts."""
        return self._select(
            "WHERE state IN ('rejected', 'dropped') AND created_at < ? "
            "AND coalesce(json_extract(CAST(body AS TEXT), '$.forgotten'), '') = ''",
            created_before,
        )

    def forget(self, moment: Moment) -> None:
        """Its texts; what was decided stays."""
        with self._store.transaction() as db:
            body = _encode(moment.without_texts())
            db.execute("UPDATE moments SET body = ? WHERE moment_id = ?", (body, moment.moment_id))

    def change(self, moment_id: str, *, expected: Iterable[State] | None = None, **changes: Any) -> Moment:
        """The moment with `changes`. Raises NotFound; UserError where it is in none of the `expected` states
        (someone else decided meanwhile)."""
        with self._store.transaction() as db:
            moment = self.get(moment_id)
            if expected is not None and moment.state not in (expected := tuple(expected)):
                raise UserError(f"moment {moment_id} is {moment.state}, not {' or '.join(expected)}")
            moment = msgspec.structs.replace(moment, **changes)
            db.execute(
                "UPDATE moments SET state = ?, tier = ?, batch_id = ?, body = ? WHERE moment_id = ?",
                (moment.state, moment.tier, moment.batch_id, _encode(moment), moment.moment_id),
            )
        return moment

    def counts(self) -> dict[str, int]:
        """How many there are in each state."""
        rows = self._store.query("SELECT state, COUNT(*) FROM moments GROUP BY state ORDER BY state")
        return {row[0]: row[1] for row in rows}

    def _select(self, clause: str, *values: object) -> list[Moment]:
        return [_decode(row) for row in self._store.query(f"SELECT body FROM moments {clause}", *values)]


def _encode(moment: Moment) -> bytes:
    return msgspec.json.encode(moment)


def _decode(row: sqlite3.Row) -> Moment:
    return msgspec.json.decode(row["body"], type=Moment)
