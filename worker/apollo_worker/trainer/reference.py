"""What the weights said before a job's first step, where its loss is measured against that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.queue import Job, JobQueue
from apollo_worker.jobs.references import References


def reference_of(
    queue: JobQueue, job: Job, measure: Callable[[Sequence[TokenisedExample]], list[Tensor]]
) -> dict[int, Tensor] | None:
    """Log-probabilities (T,) of each sequence's targets, by the sequence's number in the plan; None where the
    loss needs none. Measured before the first step, an update at a time, and kept with the job. Raises what
    `measure` raises."""
    todo, references = job.plan, References(queue, job.info.job_id)
    if not todo.objective.needs_reference:
        return None
    known = {at: torch.tensor(row) for at, row in references.known().items()}
    for step in range(0 if job.info.steps_done else todo.num_steps):
        missing = [at for at in todo.rows_of(step) if at not in known]
        if not missing:
            continue
        values = measure([todo.examples[at] for at in missing])
        new = dict(zip(missing, values, strict=True))
        references.add((at, row.tolist()) for at, row in new.items())
        known |= new
    return known
