"""Feeds a library from the queue's file, in which every step's loss is when the step has been done.

A job of several steps is a run, its loss by step; and one run, `jobs`, has a point for each job that trained,
by its number. What is trained again after a crash keeps the point of the first time.
"""

from __future__ import annotations

import math
from typing import Any

from apollo_ipc.wire.replies import ENDED_STATES, JobInfo
from apollo_worker.curves.keeper import Keeper, OpenRun, Point, Run
from apollo_worker.curves.marks import Marks
from apollo_worker.jobs.queue_file import JOB_COLUMNS, QueueFile, job_info

MAX_POINTS = 1000  # a look


class Feed:
    def __init__(self, queue: QueueFile, marks: Marks, keeper: Keeper):
        self._queue, self._marks, self._keeper = queue, marks, keeper
        self._open: dict[str, OpenRun] = {}

    def look(self) -> bool:
        """Tells what is new, one job's at most; whether there may be more at once. Raises what the library
        raises, and then a new Feed goes on where this one was."""
        next_seq = self._marks.next_seq()
        if next_seq is None:
            # What has ended before the library was named is no news.
            self._marks.set_next_seq(next_seq := self._queue.applied_seq() + 1)
        if (job := self._first(next_seq)) is None or job.state == "queued":
            return False
        has_run = job.num_steps > 1 and job.steps_done > 0
        run = _run_of(job, self._queue.queue_id)
        if has_run and self._tell(run, self._losses(job, self._last_step(run))):
            return True
        if job.state not in ENDED_STATES:
            return False
        if has_run:
            self._close(run, job.state)
        if job.steps_done:
            values = {"loss_first": job.loss_first, "loss_last": job.loss_last, "steps": job.steps_done}
            values["weight_version"] = job.weight_version
            point = Point(
                job.seq, {name: float(value) for name, value in values.items() if value is not None}
            )
            every = Run(f"{self._queue.queue_id:x}-jobs", "jobs", {})
            if point.step > self._last_step(every):
                self._tell(every, [point])
        self._marks.set_next_seq(job.seq + 1)
        return True

    def close(self) -> None:
        """The runs stay open for the process that goes on with them."""
        while self._open:
            self._open.popitem()[1].close(None)

    def _first(self, seq: int) -> JobInfo | None:
        with self._queue.reading() as db:
            row = db.execute(f"SELECT {JOB_COLUMNS} FROM jobs WHERE seq >= ? ORDER BY seq LIMIT 1", (seq,))
            found = row.fetchone()
        return job_info(found) if found else None

    def _losses(self, job: JobInfo, after: int) -> list[Point]:
        with self._queue.reading() as db:
            rows = db.execute(
                "SELECT step, loss FROM losses WHERE seq = ? AND step > ? ORDER BY step LIMIT ?",
                (job.seq, after, MAX_POINTS),
            ).fetchall()
        # SQLite stores NaN as NULL.
        return [Point(step, {"loss": math.nan if loss is None else loss}) for step, loss in rows]

    def _last_step(self, run: Run) -> int:
        """The library's own word where it has one: a kill may have come between it and our mark."""
        return max(self._opened(run).last_step, self._marks.step(run.run_id))

    def _tell(self, run: Run, points: list[Point]) -> bool:
        if points:
            self._opened(run).add(points)
            self._marks.set_step(run.run_id, points[-1].step)
        return bool(points)

    def _opened(self, run: Run) -> OpenRun:
        if run.run_id not in self._open:
            self._open[run.run_id] = self._keeper(run)
        return self._open[run.run_id]

    def _close(self, run: Run, ended: str) -> None:
        self._opened(run).close(ended)
        del self._open[run.run_id]


def _run_of(job: JobInfo, queue_id: int) -> Run:
    facts: dict[str, Any] = {"num_examples": job.num_examples, "num_steps": job.num_steps, "loss": job.loss}
    return Run(f"{queue_id:x}-{job.job_id}", job.job_id, facts)
