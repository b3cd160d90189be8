"""The jobs beside a checkpoint: which are on disk, which were lost with the weights, which a restore undid.

Each works inside a transaction that its caller holds (JobQueue says what it promises), and returns the ids of
the jobs that changed, in their order.
"""

from __future__ import annotations

import json
import sqlite3

from apollo_worker.jobs.queue_file import read_job

_HAS_A_PLAN = "seq IN (SELECT seq FROM plans UNION SELECT seq FROM requests)"
_AS_NEW = (
    "steps_done = 0, loss_first = NULL, loss_last = NULL, started_at = NULL, ended_at = NULL, "
    "weight_version = NULL"
)


def mark_durable(db: sqlite3.Connection, applied_seq: int) -> list[str]:
    changed = _ids(db, "state = 'applied' AND seq <= ?", applied_seq)
    db.execute("UPDATE jobs SET state = 'durable' WHERE state = 'applied' AND seq <= ?", (applied_seq,))
    return changed


def reconcile(db: sqlite3.Connection, applied_seq: int, job_id: str | None, steps_done: int) -> list[str]:
    durable = mark_durable(db, applied_seq)
    half_done = read_job(db, job_id) if job_id is not None else None
    later = "seq > ? AND state IN ('running', 'applied', 'durable')"
    lost = [one for one in _ids(db, later, applied_seq) if one != job_id]
    db.execute(
        f"DELETE FROM losses WHERE seq IN (SELECT seq FROM jobs WHERE {later}) "
        "AND NOT (seq IS ? AND step <= ?)",
        (applied_seq, half_done and half_done.seq, steps_done),
    )
    for one in lost:
        db.execute(
            "DELETE FROM reference_logprobs WHERE seq = (SELECT seq FROM jobs WHERE job_id = ?)", (one,)
        )
        db.execute(f"UPDATE jobs SET state = 'queued', {_AS_NEW} WHERE job_id = ? AND {_HAS_A_PLAN}", (one,))
        notes = [*read_job(db, one).notes, "its examples were forgotten: send them again"]
        db.execute(
            "UPDATE jobs SET state = 'undone', notes = ? WHERE job_id = ? AND state != 'queued'",
            (json.dumps(notes), one),
        )
    if half_done is not None and half_done.state in ("running", "applied", "durable"):
        last = db.execute(
            "SELECT loss FROM losses WHERE seq = ? AND step > 0 ORDER BY step DESC LIMIT 1", (half_done.seq,)
        ).fetchone()
        db.execute(
            "UPDATE jobs SET state = 'running', steps_done = ?, loss_last = ?, ended_at = NULL, "
            "weight_version = NULL WHERE seq = ?",
            (steps_done, last and last[0], half_done.seq),
        )
    return [*durable, *lost]


def restored(
    db: sqlite3.Connection, held_seq: int, up_to_seq: int, weight_version: int, new_version: int
) -> list[str]:
    """A version holds the jobs up to its `held_seq`, without those that an odd number of restores before it
    changed."""
    changed: list[str] = []
    may_differ = (
        "seq <= ? AND restores IS NOT NULL AND (undone_by IS NOT NULL "
        "OR (state IN ('applied', 'durable') AND (seq > ? OR restores != '[]')))"
    )
    for job_id in _ids(db, may_differ, up_to_seq, held_seq):
        info = read_job(db, job_id)
        row = db.execute("SELECT restores FROM jobs WHERE seq = ?", (info.seq,)).fetchone()
        restores: list[int] = json.loads(row["restores"])
        is_held = info.seq <= held_seq and sum(one <= weight_version for one in restores) % 2 == 0
        if new_version in restores or is_held == (info.state != "undone"):
            continue
        state, by, word = ("durable", None, "back") if is_held else ("undone", weight_version, "undone")
        notes = [*info.notes, f"{word}: weight version {weight_version} was restored"]
        db.execute(
            "UPDATE jobs SET state = ?, undone_by = ?, notes = ?, restores = ? WHERE seq = ?",
            (state, by, json.dumps(notes), json.dumps([*restores, new_version]), info.seq),
        )
        changed.append(job_id)
    return changed


def _ids(db: sqlite3.Connection, where: str, *values: object) -> list[str]:
    return [row[0] for row in db.execute(f"SELECT job_id FROM jobs WHERE {where} ORDER BY seq", values)]
