"""Takes teach jobs from the store to their end: preparing -> training -> checking -> applied | rolled back.

Each phase is stored before it is left, and may be done again from its beginning: what it trains has a key
made of job and round, so that it is trained once however often the teacher dies.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from apollo_curation.teach import examine
from apollo_curation.teach.complete import complete
from apollo_curation.teach.forget import former_answers, unlearned
from apollo_curation.teach.job import (
    Mix,
    held_prompts,
    kept_out_prompts,
    own_answers,
    prompts_beside,
    request_of,
    taught,
)
from apollo_curation.teach.material import Material, facts_of, left_out, material_of
from apollo_curation.teach.rehearsal import due, rehearsed
from apollo_curation.teach.variants import Lesson, lesson_of
from apollo_curation.teach.writer import Writer, Writing, write_forms
from apollo_curation.teach.written import stored_lesson, to_store, with_forms
from apollo_ipc.errors import ApolloError, UserError
from apollo_ipc.teaching.lessons import Learned, Outcome
from apollo_ipc.teaching.store import Phase, TeachJob, TeachStore
from apollo_ipc.wire.replies import JobInfo, RestoreResult, SyncResult
from apollo_ipc.wire.requests import TrainRequest

NOTHING_TRAINED = "cancelled before anything was trained"


class Training(Protocol):
    """The training interface (TrainClient)."""

    def submit(self, request: TrainRequest, idempotency_key: str) -> str: ...
    def job(self, job_id: str) -> JobInfo: ...
    def jobs(self) -> list[JobInfo]: ...
    def cancel(self, job_id: str) -> None: ...
    def sync(self) -> SyncResult: ...
    def pinned(self) -> int | None: ...
    def pin(self, weight_version: int | None) -> None: ...
    def restore(self, weight_version: int) -> RestoreResult: ...


class TeachFailed(ApolloError):
    """Nothing can be taught so; the message says why."""

    code = "teach_failed"


class Teacher:
    """One at a time for a store. A phase in which learner or training raises is done again."""

    def __init__(
        self,
        store: TeachStore,
        learner: Writer,
        training: Training,
        mix: Mix | None = None,
        say: Callable[[str], None] = lambda text: None,
        poll_s: float = 0.5,
    ):
        self._store, self._learner, self._training = store, learner, training
        self._mix, self._say, self._poll_s = mix or Mix(), say, poll_s

    def advance(self, job: TeachJob) -> TeachJob:
        """Does the job's phase, and stores what comes of it."""
        steps = {
            "preparing": self._prepare,
            "training": self._train,
            "checking": self._check,
            "going back": self._go_back,
        }
        try:
            return steps[job.phase](job)
        except (TeachFailed, UserError) as error:
            job = self._store.job(job.id)
            if job.phase == "going back":
                return self._store.advance(job, "failed", error=error.message)
            if job.material is None:
                return self._store.advance(job, "failed", error=error.message)
            return self._leave(job, material_of(job), "failed", error.message)

    def _prepare(self, job: TeachJob) -> TeachJob:
        """The model's own answers to what is to stay, and what it says before. Trains nothing."""
        mix = self._mix_of(job)
        if job.request.purpose == "examine":
            return self._examine(job)
        if job.material is None:
            now = time.time()
            version = self._training.sync().weight_version
            is_pinned = self._training.pinned() is None  # somebody's own pin stays theirs
            made = Material(version, now, is_pinned)
            job = self._store.advance(job, "preparing", material=msgspec.msgpack.encode(made))
        made = material_of(job)
        if made.is_pinned:
            self._training.pin(made.version_before)
        made.kept_out = own_answers(self._learner, kept_out_prompts())
        if not made.kept_out:
            raise TeachFailed("the model says nothing to any general prompt: what it loses could not be seen")
        stop, keep = partial(self._is_cancelled, job), partial(self._keep, job, made)
        complete(self._learner, job.request.facts, made.completed, keep=keep, stop=stop)
        if stop():
            return self._leave(job, made, "cancelled", NOTHING_TRAINED)
        lessons = self._lessons(job, made)
        said = made.said_before = examine.answers(self._learner, lessons)
        missing = [at for at, one in enumerate(lessons) if not examine.examined(one, said, said).is_known]
        if job.request.purpose == "teach" and missing:
            self._write_forms(job, made, lessons, missing)
            if stop():
                return self._leave(job, made, "cancelled", NOTHING_TRAINED)
            lessons = self._lessons(job, made)
            if others := [lessons[at] for at, forms in made.forms.items() if forms.is_alone]:
                made.said_before |= examine.answers(self._learner, others)
        general, near = prompts_beside(lessons, held_prompts(), mix, _seed(job))
        made.general, made.near = own_answers(self._learner, general), own_answers(self._learner, near)
        made.loss_before = examine.loss(self._learner, made.kept_out)
        if job.request.purpose == "forget":
            made.request = request_of(
                unlearned(self._store, job.request.lessons), made.general, made.near, mix, _seed(job)
            )
            return self._next(job, made, "training", 1)
        made.former = former_answers(self._learner, lessons)
        if not missing:
            return self._next(job, made, "checking", 0)
        new = {one.fact.question for one in lessons}
        earlier = due([one for one in self._store.lessons() if one.fact.question not in new])
        made.rehearsed = [one.id for one in earlier]
        again = rehearsed(earlier, random.Random(_seed(job)), self._store.written_forms)
        learned = taught([lessons[at] for at in missing], mix, again)
        made.request = request_of(learned, made.general, made.near, mix, _seed(job))
        return self._next(job, made, "training", 1)

    def _is_cancelled(self, job: TeachJob) -> bool:
        return self._store.job(job.id).is_cancelled

    def _keep(self, job: TeachJob, made: Material) -> None:
        self._store.advance(job, "preparing", material=msgspec.msgpack.encode(made))

    def _write_forms(
        self, job: TeachJob, made: Material, lessons: Sequence[Lesson], missing: Sequence[int]
    ) -> None:
        """Into `made`, which is stored on the way: what was written is not written again after a crash."""

        def keep(writing: Writing) -> None:
            made.writing = writing
            self._keep(job, made)

        made.writing = write_forms(
            self._learner,
            lessons,
            missing,
            made.forms,
            made.writing,
            choice=job.request.options.writer or "auto",
            seed=_seed(job),
            keep=keep,
            stop=partial(self._is_cancelled, job),
        )

    def _train(self, job: TeachJob) -> TeachJob:
        made = material_of(job)
        assert made.request is not None
        if job.is_cancelled and not made.train_jobs:
            return self._leave(job, made, "cancelled", NOTHING_TRAINED)
        train_job = self._training.submit(made.request, f"{job.id}-{job.round}")
        if train_job not in made.train_jobs:
            made.train_jobs.append(train_job)
        ended = self._wait(job, train_job)
        if ended.state not in ("applied", "durable"):
            end: Phase = "cancelled" if self._is_cancelled(job) else "failed"
            reason = f"training job {train_job} {ended.state}: {ended.error or 'no reason given'}"
            return self._leave(job, made, end, reason)
        return self._next(job, made, "checking", job.round)

    def _check(self, job: TeachJob) -> TeachJob:
        made, limits = material_of(job), self._limits_of(job)
        lessons = self._lessons(job, made)
        after = examine.answers(self._learner, lessons)
        rise = examine.loss(self._learner, made.kept_out) - made.loss_before
        facts = [examine.examined(lesson, made.said_before, after) for lesson in lessons]
        known, hits = examine.share_known(facts), examine.share_hit(facts)
        is_over, forgets = job.round >= limits.rounds or job.is_cancelled, job.request.purpose == "forget"
        reason = examine.harm(rise, 0.0 if forgets else hits, limits)
        if not reason and not forgets and known < limits.min_known and is_over:
            reason = f"{known:.0%} is right after {job.round} rounds, below {limits.min_known:.0%}"
        made.report = examine.TeachReport(
            *("applied", reason, known, hits, rise, facts, made.train_jobs, made.version_before),
            *(made.writing, left_out(job, made)),
        )
        if job.is_cancelled:
            return self._leave(job, made, "cancelled", "cancelled")
        if reason:
            return self._leave(job, made, "rolled back", reason)
        if not is_over and (more := self._more(job, made, lessons, facts)) is not None:
            made.request = more
            return self._next(job, made, "training", job.round + 1)
        if forgets and known:
            made.reason = f"{known:.0%} of what was asked is still answered with what was to be forgotten"
        return self._end(job, made, "applied")

    def _more(
        self, job: TeachJob, made: Material, lessons: list[Lesson], facts: list[examine.Examined]
    ) -> TrainRequest | None:
        """The next round, of what was missed in this one; None: nothing was."""
        mix, seed = self._mix_of(job), _seed(job) + job.round
        if job.request.purpose == "forget":
            left = [
                lesson
                for lesson, one in zip(job.request.lessons, facts, strict=True)
                if examine.share_known([one])
            ]
            again = unlearned(self._store, left)
        else:
            known = {at for at, one in enumerate(facts) if one.is_known}
            held = [asked for at in known for asked in lessons[at].forward[:1] + lessons[at].backward[:1]]
            left = [lesson for at, lesson in enumerate(lessons) if at not in known]
            again = taught(left, mix, held)
        return request_of(again, made.general, made.near, mix, seed) if left else None

    def _examine(self, job: TeachJob) -> TeachJob:
        """Asks, and trains nothing."""
        lessons = self._lessons(job)
        said = examine.answers(self._learner, lessons)
        facts = [examine.examined(lesson, said, said) for lesson in lessons]
        known, hits = examine.share_known(facts), examine.share_hit(facts)
        report = examine.TeachReport("applied", "", known, hits, 0.0, facts, [], 0)
        asked = zip(job.request.lessons, (one.is_known for one in facts), strict=True)
        return self._store.advance(
            job, "applied", report=msgspec.to_builtins(report), outcome=Outcome(known=dict(asked))
        )

    def _go_back(self, job: TeachJob) -> TeachJob:
        """The weights of before, unless somebody else's job came between: it would go as well."""
        made = material_of(job)
        own = [one for one in self._training.jobs() if one.job_id in made.train_jobs]
        if any(one.steps_done for one in own if one.state != "undone"):
            if strangers := self._strangers(made):
                made.reason += (
                    f"; not taken back: job {strangers[0]} of somebody else was trained since version "
                    f"{made.version_before}, and would go with it"
                )
                return self._end(job, made, "applied" if made.end == "rolled back" else made.end)
            self._training.restore(made.version_before)
        return self._end(job, made, made.end)

    # --- inside ---

    def _lessons(self, job: TeachJob, made: Material | None = None) -> list[Lesson]:
        facts, ids = job.request.facts, job.request.lessons
        if ids:
            stored = enumerate(zip(facts, map(self._store.written_forms, ids), strict=True))
            return [stored_lesson(fact, at, forms) for at, (fact, forms) in stored]
        assert made is not None
        whole = enumerate(facts_of(job, made))
        return [with_forms(lesson_of(fact, at), made.forms.get(at)) for at, fact in whole]

    def _mix_of(self, job: TeachJob) -> Mix:
        lr = job.request.options.lr
        return self._mix if lr is None else msgspec.structs.replace(self._mix, lr=lr)

    def _limits_of(self, job: TeachJob) -> examine.Limits:
        given = msgspec.to_builtins(job.request.options)
        return msgspec.convert({k: v for k, v in given.items() if k != "lr"}, examine.Limits)

    def _wait(self, job: TeachJob, train_job: str) -> JobInfo:
        is_told = False
        while True:
            ended = self._training.job(train_job)
            if ended.state in ("applied", "durable", "failed", "cancelled", "quarantined", "undone"):
                return ended
            if not is_told and self._is_cancelled(job):
                self._training.cancel(train_job)
                is_told = True
            time.sleep(self._poll_s)

    def _strangers(self, made: Material) -> list[str]:
        return [
            one.job_id
            for one in self._training.jobs()
            if one.job_id not in made.train_jobs
            and one.steps_done
            and one.state != "undone"
            and (one.ended_at is None or one.ended_at > made.synced_at)
        ]

    def _next(self, job: TeachJob, made: Material, phase: Phase, number: int) -> TeachJob:
        return self._store.advance(job, phase, round=number, material=msgspec.msgpack.encode(made))

    def _leave(self, job: TeachJob, made: Material, end: Phase, reason: str) -> TeachJob:
        made.end, made.reason = end, reason
        return self._next(job, made, "going back", job.round)

    def _end(self, job: TeachJob, made: Material, phase: Phase) -> TeachJob:
        if made.is_pinned and self._training.pinned() == made.version_before:
            self._training.pin(None)
        report = made.report
        shown = None
        if report is not None:
            reason = made.reason or report.reason
            shown = msgspec.to_builtins(msgspec.structs.replace(report, state=phase, reason=reason))
        return self._store.advance(
            job,
            phase,
            report=shown,
            error=made.reason or None,
            outcome=self._outcome(job, made) if phase == "applied" else None,
        )

    def _outcome(self, job: TeachJob, made: Material) -> Outcome | None:
        if made.report is None:
            return None
        if job.request.purpose == "forget":
            return Outcome(forgotten=job.request.lessons)
        former = made.former or [b""] * len(made.report.facts)  # prepared by an older program
        return Outcome(
            [
                Learned(one.fact, one.taught.before, one.is_known, answers, to_store(made.forms.get(at)))
                for at, (one, answers) in enumerate(zip(made.report.facts, former, strict=True))
            ],
            made.rehearsed,
        )


def _seed(job: TeachJob) -> int:
    """The same whenever the phase is done again."""
    return int(job.id.rpartition("-")[2][:8], 16)
