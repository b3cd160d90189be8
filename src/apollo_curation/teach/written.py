"""Forms that the served model wrote: beside those of the rules, or in their place."""

from __future__ import annotations

import re

import msgspec

from apollo_curation.teach.variants import Asked, Lesson, lesson_of
from apollo_ipc.teaching.facts import Fact
from apollo_ipc.teaching.wording import ASKING


class Written(msgspec.Struct, frozen=True):
    """Forms of a fact that were kept. is_alone: they take the place of the rules' ones; then the last three
    lists, which are only asked, are the examination."""

    forward: list[str] = []
    backward: list[str] = []
    near_misses: list[str] = []
    is_alone: bool = False
    paraphrased: list[str] = []
    reversed: list[str] = []
    not_it: list[str] = []


def is_of_rules(fact: Fact) -> bool:
    """Whether the rules know what the question asks for; they know English."""
    return not set(ASKING).isdisjoint(re.findall(r"\w+", fact.question.lower()))


def with_forms(lesson: Lesson, forms: Written | None) -> Lesson:
    if forms is None:
        return lesson
    fact = lesson.fact
    forward = [Asked(question, fact.answer) for question in forms.forward]
    backward = [Asked(question, fact.statement) for question in forms.backward]
    if not forms.is_alone:
        return lesson._replace(
            forward=lesson.forward + forward,
            backward=lesson.backward + backward,
            near_misses=lesson.near_misses + forms.near_misses,
        )
    return lesson._replace(
        forward=lesson.forward[:1] + forward,
        backward=backward,
        near_misses=forms.near_misses,
        paraphrased=[Asked(question, fact.key) for question in forms.paraphrased],
        reversed=[Asked(question, subject_of(lesson)) for question in forms.reversed],
        not_it=[Asked(question, fact.key) for question in forms.not_it],
    )


def stored_lesson(fact: Fact, at: int, forms: bytes) -> Lesson:
    """A lesson with the forms that `to_store` gave."""
    return with_forms(lesson_of(fact, at), msgspec.msgpack.decode(forms, type=Written) if forms else None)


def to_store(forms: Written | None) -> bytes:
    return b"" if forms is None or forms == Written() else msgspec.msgpack.encode(forms)


def in_front(lesson: Lesson, question: str) -> str:
    """The question with the fact in its context: in the user's turn, since not every template takes a system
    prompt, and without a word of any language of ours."""
    fact = lesson.fact
    is_whole = subject_of(lesson).casefold() in fact.statement.casefold()
    said = fact.statement if is_whole else f"{fact.question} {fact.answer}"
    return f"{said}\n\n{question}"


def subject_of(lesson: Lesson) -> str:
    return lesson.reversed[0].answer
