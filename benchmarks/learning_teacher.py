"""`teach` whole, in one process: the product's own Teacher, whose training jobs are trained at once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from apollo_curation.teach.job import Mix
from apollo_curation.teach.teacher import Teacher
from apollo_curation.teach.variants import Lesson
from apollo_ipc.teaching.facts import Fact
from apollo_ipc.teaching.store import ENDED_PHASES, TeachJob, TeachOptions, TeachRequest, TeachStore
from apollo_ipc.wire.replies import JobInfo, RestoreResult, SyncResult
from apollo_ipc.wire.requests import TrainRequest

if TYPE_CHECKING:
    from learning_model import OfflineModel

# What harms is measured here, so nothing of it is taken back.
OPTIONS = TeachOptions(min_known=0.0, max_rise=100.0, max_hits=1.0, writer="rules")

# Parts that are fields of the mix; the others PartsOfATeacher leaves out.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "replay": {"num_general": 0},
    "near": {"num_near": 0},
    "floor": {"target_probability": 1.0},
    "freeze": {"freezes_embeddings": False},
}


class TrainedHere:
    """The training interface of a Teacher. tokens: that went through the model."""

    def __init__(self, model: OfflineModel):
        self._model, self.tokens, self._jobs = model, 0, dict[str, JobInfo]()
        self._pinned: int | None = None

    def submit(self, request: TrainRequest, idempotency_key: str) -> str:
        if idempotency_key not in self._jobs:
            self.tokens += self._model.train(request)
            now, number = time.time(), len(self._jobs) + 1
            self._jobs[idempotency_key] = JobInfo(
                idempotency_key, number, "applied", now, len(request.examples), 1, steps_done=1, ended_at=now
            )
        return idempotency_key

    def job(self, job_id: str) -> JobInfo:
        return self._jobs[job_id]

    def jobs(self) -> list[JobInfo]:
        return [*self._jobs.values()]

    def cancel(self, job_id: str) -> None:
        raise NotImplementedError("nothing is cancelled here")

    def sync(self) -> SyncResult:
        return SyncResult(len(self._jobs), time.time(), 0, 0, 0, 0, 0, 0.0)

    def pinned(self) -> int | None:
        return self._pinned

    def pin(self, weight_version: int | None) -> None:
        self._pinned = weight_version

    def restore(self, weight_version: int) -> RestoreResult:
        raise NotImplementedError("nothing is taken back here")


class PartsOfATeacher(Teacher):
    """Without some of: variants (the fact's own question in their place), backward."""

    without: Sequence[str] = ()

    def _lessons(self, job: TeachJob, made: Any = None) -> list[Lesson]:
        lessons = super()._lessons(job, made)
        if "variants" in self.without:
            views = len(lessons[0].forward) + len(lessons[0].backward)
            lessons = [one._replace(forward=one.forward[:1] * views, backward=[]) for one in lessons]
        if "backward" in self.without:
            lessons = [one._replace(backward=[]) for one in lessons]
        return lessons


def teach(model: OfflineModel, facts: Sequence[Fact], mix: Mix, without: Sequence[str]) -> tuple[int, int]:
    """(tokens, rounds)."""
    for part in without:
        mix = msgspec.structs.replace(mix, **LEFT_OUT.get(part, {}))
    training = TrainedHere(model)
    with (
        tempfile.TemporaryDirectory(prefix="apollo-learning-") as directory,
        TeachStore(Path(directory) / "teaching.sqlite") as store,
    ):
        teacher = PartsOfATeacher(store, model, training, mix, poll_s=0)
        teacher.without = without
        job = store.admit(TeachRequest([*facts], OPTIONS), b"", client_key=None)
        while job.phase not in ENDED_PHASES:
            job = teacher.advance(job)
    assert job.phase == "applied", (job.phase, job.error)
    return training.tokens, job.round
