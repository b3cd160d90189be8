"""Which jobs have ended since, for whoever tells others of it."""

from __future__ import annotations

from typing import NamedTuple

from apollo_worker.jobs.queue_file import QueueFile


class Ending(NamedTuple):
    seq: int
    job_id: str
    state: str  # applied, durable, failed, quarantined
    ended_at: float


def endings(queue: QueueFile, from_seq: int) -> tuple[list[Ending], int]:
    """(how jobs from `from_seq` on ended, in their order; the `from_seq` of the next look).

    What lies before that has ended for good, except where a crash takes a checkpoint back: then its jobs are
    open again, and it is their seq that the next look begins with.
    """
    with queue.reading() as db:
        db.execute("BEGIN")  # one state of the file for both
        try:
            first_open = db.execute(
                "SELECT coalesce(min(seq), (SELECT max(seq) + 1 FROM jobs), 1) FROM jobs "
                "WHERE state IN ('queued', 'running', 'applied')"
            ).fetchone()[0]
            rows = db.execute(
                "SELECT seq, job_id, state, ended_at FROM jobs WHERE seq >= ? AND ended_at IS NOT NULL AND "
                "state IN ('applied', 'durable', 'failed', 'quarantined') ORDER BY seq",
                (min(from_seq, first_open),),
            ).fetchall()
        finally:
            db.execute("COMMIT")
    return [Ending(*row) for row in rows], first_open
