"""What a teach job has in hand between its phases, stored with it."""

from __future__ import annotations

import msgspec

from apollo_curation.teach import examine
from apollo_curation.teach.job import OwnAnswer
from apollo_curation.teach.writer import Writing
from apollo_curation.teach.written import Written
from apollo_ipc.teaching.facts import Fact
from apollo_ipc.teaching.store import Phase, TeachJob
from apollo_ipc.wire.requests import TrainRequest


class Material(msgspec.Struct):
    """What a job needs to go on after a crash. version_before, synced_at: what going back means, and from
    when on a job of others stands in its way; is_pinned: by this job; general, near: the model's own answers
    to be kept; kept_out: those only measured; former: of each lesson, what a `forget` goes back to;
    said_before: to the examination; request: the next training job; train_jobs: those given to the worker;
    rehearsed: lessons that come back in it; end, reason: what a job that goes back ends as, and why; writing,
    forms: of facts by their number, how the served model wrote, and what was kept; completed: of statements
    without a question, by their number in the request, None: left out."""

    version_before: int
    synced_at: float
    is_pinned: bool
    kept_out: list[OwnAnswer] = []
    general: list[OwnAnswer] = []
    near: list[OwnAnswer] = []
    former: list[bytes] = []
    said_before: dict[str, str] = {}
    loss_before: float = 0.0
    request: TrainRequest | None = None
    train_jobs: list[str] = []
    rehearsed: list[str] = []
    end: Phase = "rolled back"
    reason: str = ""
    report: examine.TeachReport | None = None
    writing: Writing | None = None
    forms: dict[int, Written] = {}
    completed: dict[int, Fact | None] = {}


def material_of(job: TeachJob) -> Material:
    assert job.material is not None
    return msgspec.msgpack.decode(job.material, type=Material)


def facts_of(job: TeachJob, made: Material) -> list[Fact]:
    """Those that are taught, in their order."""
    sent = enumerate(job.request.facts)
    return [whole for at, one in sent if (whole := one if one.question else made.completed.get(at))]


def left_out(job: TeachJob, made: Material) -> list[str]:
    return [job.request.facts[at].statement for at, whole in made.completed.items() if whole is None]
