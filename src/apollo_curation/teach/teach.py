"""Teaching on the served model: preparing -> training -> checking -> applied | rolled back.

A job a round, until the facts are known or the rounds are over. The version before is pinned; where too much
else was lost, or too few facts are known in the end, it is written back.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

import msgspec

from apollo_curation.teach.facts import Asked, Fact, Lesson, lesson_of
from apollo_curation.teach.job import (
    Learner,
    Mix,
    OwnAnswer,
    general_prompts,
    own_answers,
    prompts_beside,
    request_of,
)
from apollo_ipc.errors import ApolloError
from apollo_ipc.wire.replies import JobInfo, RestoreResult, SyncResult
from apollo_ipc.wire.requests import TrainRequest
from apollo_ipc.words import is_in

SAID_TOKENS = 48  # of an answer in the examination
NUM_KEPT_OUT = 12  # general prompts that are only measured


class Training(Protocol):
    """The training interface (TrainClient)."""

    def submit(self, request: TrainRequest, idempotency_key: str) -> str: ...
    def wait(self, job_id: str) -> JobInfo: ...
    def sync(self) -> SyncResult: ...
    def pin(self, weight_version: int) -> None: ...
    def restore(self, weight_version: int) -> RestoreResult: ...


class TeachFailed(ApolloError):
    """A job did not reach the weights, or nothing can be taught so; the message says which."""

    code = "teach_failed"


class Limits(msgspec.Struct, frozen=True):
    """min_known: share of the examination that has to be right; max_rise: nats a token that the model's own
    earlier answers may lose; max_hits: share of near misses that may name the fact; rounds: jobs at most."""

    min_known: float = 0.5
    max_rise: float = 0.3
    max_hits: float = 0.5
    rounds: int = 3


class Answered(msgspec.Struct, frozen=True):
    question: str
    before: str
    after: str
    is_right: bool  # afterwards; of a near miss: whether it names the fact


class Examined(msgspec.Struct, frozen=True):
    """One fact: whether its own question is answered, and what was never trained."""

    fact: Fact
    taught: Answered
    paraphrased: list[Answered]
    reversed: list[Answered]
    not_it: list[Answered]


class TeachReport(msgspec.Struct, frozen=True):
    """known: share of taught, paraphrased and reversed questions that are right; hits: of near misses that
    name the fact; rise: nats a token on general answers; version_before: the pinned one."""

    state: Literal["applied", "rolled back"]
    reason: str
    known: float
    hits: float
    rise: float
    facts: list[Examined]
    jobs: list[str]
    version_before: int


def teach(
    facts: Sequence[Fact],
    learner: Learner,
    training: Training,
    *,
    mix: Mix,
    limits: Limits,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> TeachReport:
    """Raises TeachFailed, and what learner and training raise: what was trained then stays, and the version
    before is pinned."""
    lessons = [lesson_of(fact) for fact in facts]
    say("preparing: the model's own answers to general prompts and near misses")
    prompts = general_prompts()
    if not (kept_out := own_answers(learner, prompts[::7][:NUM_KEPT_OUT])):
        raise TeachFailed("the model says nothing to any general prompt: what it loses could not be seen")
    trained = [prompt for at, prompt in enumerate(prompts) if at % 7]
    general, near = (own_answers(learner, some) for some in prompts_beside(lessons, trained, mix, seed))
    questions = [asked.question for lesson in lessons for asked in _examination(lesson)]
    before = _answers(learner, questions)
    loss_before = _loss(learner, kept_out)
    version = training.sync().weight_version
    training.pin(version)
    jobs: list[str] = []
    while True:
        say(f"training: round {len(jobs) + 1}")
        request = request_of(lessons, general, near, mix, seed + len(jobs))
        jobs.append(training.submit(request, uuid.uuid4().hex))
        if (job := training.wait(jobs[-1])).state not in ("applied", "durable"):
            raise TeachFailed(f"job {job.job_id} {job.state}: {job.error or 'no reason given'}")
        say("checking")
        after = _answers(learner, questions)
        examined = [_examined(lesson, before, after) for lesson in lessons]
        rise = _loss(learner, kept_out) - loss_before
        known, hits = _known(examined), _share([one for fact in examined for one in fact.not_it])
        harm = _harm(rise, hits, limits)
        if harm or known >= limits.min_known or len(jobs) == limits.rounds:
            break
    reason = harm
    if not reason and known < limits.min_known:
        reason = f"{known:.0%} is right after {len(jobs)} rounds, below {limits.min_known:.0%}"
    if reason:
        say("going back")
        training.restore(version)
    state = "rolled back" if reason else "applied"
    return TeachReport(state, reason, known, hits, rise, examined, jobs, version)


def _harm(rise: float, hits: float, limits: Limits) -> str:
    if not rise <= limits.max_rise:  # NaN is harm
        return f"general answers lose {rise:.2f} nats a token, above {limits.max_rise:g}"
    if hits > limits.max_hits:
        return f"{hits:.0%} of the near misses name the fact, above {limits.max_hits:.0%}"
    return ""


def _examination(lesson: Lesson) -> list[Asked]:
    own = Asked(lesson.fact.question, lesson.not_it[0].answer)
    return [own, *lesson.paraphrased, *lesson.reversed, *lesson.not_it]


def _answers(learner: Learner, questions: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor(learner.num_parallel) as pool:
        said = pool.map(lambda question: learner.say(question, max_tokens=SAID_TOKENS), questions)
        return dict(zip(questions, said, strict=True))


def _examined(lesson: Lesson, before: dict[str, str], after: dict[str, str]) -> Examined:
    def look(asked: Asked) -> Answered:
        said = after[asked.question]
        return Answered(asked.question, before[asked.question], said, is_in(asked.answer, said))

    taught, *_ = _examination(lesson)
    groups = (lesson.paraphrased, lesson.reversed, lesson.not_it)
    return Examined(lesson.fact, look(taught), *([look(asked) for asked in group] for group in groups))


def _known(examined: Sequence[Examined]) -> float:
    return _share([one for fact in examined for one in (fact.taught, *fact.paraphrased, *fact.reversed)])


def _share(answers: Sequence[Answered]) -> float:
    return sum(one.is_right for one in answers) / len(answers)


def _loss(learner: Learner, answers: Sequence[OwnAnswer]) -> float:
    """Nats a token that the model now needs for what it said of itself before."""
    values = [
        value
        for answer in answers
        for value in learner.token_logprobs([*answer.context_ids, *answer.ids])[-len(answer.ids) :]
    ]
    return -math.fsum(values) / len(values)
