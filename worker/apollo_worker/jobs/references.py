"""Log-probabilities by the weights before a job's first step, kept with the job: what it is measured against.

A job that is resumed has the same. One that is queued again, since its weights were lost, measures anew: then
the weights before its first step are others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from apollo_worker.jobs.queue_file import QueueFile, read_job


class References:
    """Of one job; of its plan's sequences, by their number. Each value: (T,) log p of the targets."""

    def __init__(self, queue: QueueFile, job_id: str):
        self._queue, self._job_id = queue, job_id

    def known(self) -> dict[int, list[float]]:
        with self._queue.reading() as db:
            seq = read_job(db, self._job_id).seq
            rows = db.execute("SELECT at, logprobs FROM reference_logprobs WHERE seq = ?", (seq,))
            return {at: list(struct.unpack(f"<{len(body) // 4}f", body)) for at, body in rows}

    def add(self, values: Iterable[tuple[int, Sequence[float]]]) -> None:
        """Returns after the commit; fp32, so they are read as they were written."""
        with self._queue.changing() as db:
            seq = read_job(db, self._job_id).seq
            db.executemany(
                "INSERT OR REPLACE INTO reference_logprobs (seq, at, logprobs) VALUES (?, ?, ?)",
                ((seq, at, struct.pack(f"<{len(row)}f", *row)) for at, row in values),
            )
