"""Asking the model before and after: what it was taught, what it was not, and what it used to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from apollo_curation.teach.job import Learner, OwnAnswer
from apollo_curation.teach.variants import Asked, Lesson
from apollo_curation.teach.writer import Writing
from apollo_ipc.teaching.facts import Fact
from apollo_ipc.words import is_in

SAID_TOKENS = 32  # of an answer in the examination


class Limits(msgspec.Struct, frozen=True):
    """min_known: share of the examination that has to be right; max_rise: nats a token that the model's own
    earlier answers may lose; max_hits: share of near misses that may name the fact; rounds: jobs at most."""

    min_known: float = 0.5
    max_rise: float = 0.3
    max_hits: float = 0.5
    rounds: int = 3


class ExaminedAnswer(msgspec.Struct, frozen=True):
    question: str
    before: str
    after: str
    is_right: bool  # afterwards; of a near miss: whether it names the fact


class Examined(msgspec.Struct, frozen=True):
    """One fact: whether its own question is answered, and what was never trained."""

    fact: Fact
    taught: ExaminedAnswer
    paraphrased: list[ExaminedAnswer]
    reversed: list[ExaminedAnswer]
    not_it: list[ExaminedAnswer]

    @property
    def is_known(self) -> bool:
        """Its own question, and most of those that were never trained."""
        others = [*self.paraphrased, *self.reversed]
        return self.taught.is_right and 2 * sum(one.is_right for one in others) > len(others)


class TeachReport(msgspec.Struct, frozen=True):
    """known: share of taught, paraphrased and reversed questions that are right; hits: of near misses that
    name the fact; rise: nats a token on general answers; version_before: what going back means; writing: who
    made the forms, None: nothing was trained; left_out: statements of which nobody made a question."""

    state: Literal["applied", "rolled back", "failed", "cancelled"]
    reason: str
    known: float
    hits: float
    rise: float
    facts: list[Examined]
    jobs: list[str]
    version_before: int
    writing: Writing | None = None
    left_out: list[str] = []


def examination(lesson: Lesson) -> list[Asked]:
    own = Asked(lesson.fact.question, lesson.fact.key)
    return [own, *lesson.paraphrased, *lesson.reversed, *lesson.not_it]


def answers(learner: Learner, lessons: Sequence[Lesson]) -> dict[str, str]:
    """What the model says to each question of the examination of `lessons`."""
    questions = list(dict.fromkeys(asked.question for one in lessons for asked in examination(one)))
    return dict(zip(questions, learner.say(questions, max_tokens=SAID_TOKENS), strict=True))


def examined(lesson: Lesson, before: dict[str, str], after: dict[str, str]) -> Examined:
    def look(asked: Asked) -> ExaminedAnswer:
        said = after[asked.question]
        return ExaminedAnswer(asked.question, before[asked.question], said, is_in(asked.answer, said))

    groups = (lesson.paraphrased, lesson.reversed, lesson.not_it)
    own = look(examination(lesson)[0])
    return Examined(lesson.fact, own, *([look(asked) for asked in group] for group in groups))


def share_known(facts: Sequence[Examined]) -> float:
    return _share([one for fact in facts for one in (fact.taught, *fact.paraphrased, *fact.reversed)])


def share_hit(facts: Sequence[Examined]) -> float:
    return _share([one for fact in facts for one in fact.not_it])


def harm(rise: float, hits: float, limits: Limits) -> str:
    """Why what was trained may not stay; empty: it may."""
    if not rise <= limits.max_rise:  # NaN is harm
        return f"general answers lose {rise:.2f} nats a token, above {limits.max_rise:g}"
    if hits > limits.max_hits:
        return f"{hits:.0%} of the near misses name the fact, above {limits.max_hits:.0%}"
    return ""


def loss(learner: Learner, own: Sequence[OwnAnswer]) -> float:
    """Nats a token that the model now needs for what it said of itself before."""
    found = learner.token_logprobs([[*one.context_ids, *one.ids] for one in own])
    values = [v for one, row in zip(own, found, strict=True) for v in row[-len(one.ids) :]]
    return -math.fsum(values) / len(values)


def _share(asked: Sequence[ExaminedAnswer]) -> float:
    return sum(one.is_right for one in asked) / len(asked) if asked else 0.0
