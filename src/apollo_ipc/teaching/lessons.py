"""Lessons as they are stored: what was taught, and what the end of a job does to them."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping, Sequence

import msgspec

from apollo_ipc.teaching.facts import Fact

LESSON = "id, job, taught_at, fact, former, rehearsed, is_known, asked_at"


class StoredLesson(msgspec.Struct, frozen=True):
    """former: what the model said to its question before; rehearsed: jobs in which it has come back since."""

    id: str
    job: str
    taught_at: float
    fact: Fact
    former: str
    rehearsed: int
    is_known: bool
    asked_at: float


class Learned(msgspec.Struct, frozen=True):
    """A fact of a job that is applied. answers: the model's own from before, which a later `forget` goes back
    to; forms: those that it wrote. Both are the teacher's business."""

    fact: Fact
    former: str
    is_known: bool
    answers: bytes = b""
    forms: bytes = b""


class Outcome(msgspec.Struct, frozen=True):
    """What a job's end does to lessons. learned: new ones, each in the place of one with its question;
    rehearsed: those that came back; known: whether each that was asked holds; forgotten: those that go."""

    learned: Sequence[Learned] = ()
    rehearsed: Sequence[str] = ()
    known: Mapping[str, bool] = {}
    forgotten: Sequence[str] = ()


def settle(db: sqlite3.Connection, job: str, outcome: Outcome, now: float) -> None:
    """Within a transaction; now: seconds since the epoch."""
    earlier = {}
    if outcome.learned:
        earlier = {lesson_in(row).fact.question: row for row in db.execute(f"SELECT {LESSON} FROM lessons")}
    for one in outcome.learned:
        lesson, former, replaced = (
            f"lesson-{secrets.token_hex(6)}",
            one.former,
            earlier.get(one.fact.question),
        )
        if one.answers:
            db.execute("INSERT INTO former_answers VALUES (?, ?)", (lesson, one.answers))
        if one.forms:
            db.execute("INSERT INTO written_forms VALUES (?, ?)", (lesson, one.forms))
        if replaced is not None:  # what it said before it was first taught
            former = replaced["former"]
            db.execute(
                "UPDATE OR REPLACE former_answers SET lesson = ? WHERE lesson = ?", (lesson, replaced["id"])
            )
            was_known = not one.forms and lesson_in(replaced).fact == one.fact
            if was_known:  # nothing was written anew
                db.execute("UPDATE written_forms SET lesson = ? WHERE lesson = ?", (lesson, replaced["id"]))
            db.execute("DELETE FROM written_forms WHERE lesson = ?", (replaced["id"],))
            db.execute("DELETE FROM lessons WHERE id = ?", (replaced["id"],))
        db.execute(
            f"INSERT INTO lessons ({LESSON}) VALUES (?, ?, ?, ?, ?, 0, ?, ?)",
            (lesson, job, now, msgspec.json.encode(one.fact), former, one.is_known, now),
        )
    for lesson in outcome.rehearsed:
        db.execute("UPDATE lessons SET rehearsed = rehearsed + 1 WHERE id = ?", (lesson,))
    for lesson, is_known in outcome.known.items():
        db.execute("UPDATE lessons SET is_known = ?, asked_at = ? WHERE id = ?", (is_known, now, lesson))
    for lesson in outcome.forgotten:
        db.execute("DELETE FROM lessons WHERE id = ?", (lesson,))
        db.execute("DELETE FROM former_answers WHERE lesson = ?", (lesson,))
        db.execute("DELETE FROM written_forms WHERE lesson = ?", (lesson,))


def lesson_in(row: sqlite3.Row) -> StoredLesson:
    return StoredLesson(
        row["id"],
        row["job"],
        row["taught_at"],
        msgspec.json.decode(row["fact"], type=Fact),
        row["former"],
        row["rehearsed"],
        bool(row["is_known"]),
        row["asked_at"],
    )
