"""All jobs at a glance: how many there are in each state, and since when the oldest one waits."""

from __future__ import annotations

from apollo_worker.jobs.queue_file import QueueFile


def num_jobs(queue: QueueFile) -> dict[str, int]:
    """state -> jobs in it; a state without jobs is left out."""
    with queue.reading() as db:
        return dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())


def oldest_queued_at(queue: QueueFile) -> float | None:
    """`created_at` of the queued job whose turn comes first."""
    with queue.reading() as db:
        row = db.execute("SELECT created_at FROM jobs WHERE state = 'queued' ORDER BY seq LIMIT 1").fetchone()
    return row and row[0]
