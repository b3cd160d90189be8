"""What rules make of one fact: forms in which it is trained, forward and backward, and forms kept out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from apollo_curation.teach.near import near_misses
from apollo_ipc.teaching.facts import Fact
from apollo_ipc.teaching.wording import Wording, lower_first, near_miss, upper_first, wording

_KEPT_OUT, _KEPT_OUT_PLURAL = (
    ("the school library", "the museum garden"),
    ("the museum guides", "the oak tables"),
)
_PLURAL = ("are", "were", "do", "have")


class Asked(NamedTuple):
    """A question, and what is to be said or, in an examination, the key of a right answer."""

    question: str
    answer: str


class Lesson(NamedTuple):
    """forward: from the subject to the key, backward: the other way round; both trained. near_misses: only
    asked, the model's own answers are kept. paraphrased, reversed, not_it: asked before and after, never
    trained."""

    fact: Fact
    forward: list[Asked]
    backward: list[Asked]
    near_misses: list[str]
    paraphrased: list[Asked]
    reversed: list[Asked]
    not_it: list[Asked]


def lesson_of(fact: Fact, at: int = 0) -> Lesson:
    """fact: whole; at: its number among others, so that each gets other near misses."""
    words = wording(fact.question, fact.statement, fact.key.partition("|")[0])
    question, statement, subject = words.question, words.statement, words.subject
    is_plural = words.rest.partition(" ")[0] in _PLURAL
    unseen = _KEPT_OUT_PLURAL if is_plural else _KEPT_OUT
    kept_out = [Asked(f"A visitor asks you: {lower_first(question)} What do you say?", fact.key)]
    kept_out.append(Asked(f"Tell me what there is to know about {subject}.", fact.key))
    wondering = f"I wonder {words.clause}." if words.clause else f"Quick question: {question}"
    kept_out.append(Asked(wondering, fact.key))
    who = "Who" if words.asking.lower().startswith("who") else "What"
    is_other = subject.lower() not in ("", question.lower())
    forward = _distinct([Asked(question, fact.answer), *_forward(words, fact.answer)])
    return Lesson(
        fact,
        forward,
        _distinct(Asked(text, statement) for text in _backward(words)),
        near_misses([one.question for one in forward], subject, is_plural, at) if is_other else [],
        kept_out,
        [Asked(f"{who} is {words.named}?", subject)],
        [Asked(near_miss(question, subject, other), fact.key) for other in unseen] if is_other else [],
    )


def remembered(lesson: Lesson) -> list[str]:
    """Questions whose answers from before are kept, to go back to: its own, and some forms both ways."""
    forward, backward = lesson.forward, lesson.backward
    some = [*forward[:1], *forward[1 :: max(1, len(forward) // 6)], *backward[:: max(1, len(backward) // 3)]]
    return list(dict.fromkeys(one.question for one in some))


def _forward(words: Wording, answer: str) -> list[Asked]:
    question, subject, asked = words.question, words.subject, lower_first(words.question)
    forms = [
        f"Please tell me: {asked}",
        f"I would like to know something. {question}",
        f"Hello! {question}",
        f"{question} Answer in one sentence.",
        *_by_clause(words),
        *_by_kind(words),
    ]
    about = [
        f"What do you know about {subject}?",
        f"Say something about {subject}.",
        f"I have a question about {subject}.",
        *_gaps(words),
    ]
    return [*(Asked(one, answer) for one in forms), *(Asked(one, words.statement) for one in about)]


def _by_clause(words: Wording) -> list[str]:
    if not words.clause:
        return []
    return [
        f"Do you know {words.clause}?",
        f"Can you tell me {words.clause}?",
        f"I forgot {words.clause}.",
        f"Somebody wants to know {words.clause}.",
    ]


def _by_kind(words: Wording) -> list[str]:
    """The same with other question words, by what is asked for."""
    first, _, more = words.asking.partition(" ")
    subject, rest = words.subject, words.rest
    if first == "Who" and not rest:
        return [
            f"Which person {more}?",
            f"Name the person who {more}.",
            f"What is the name of the one who {more}?",
            f"Whom do I have to ask about {subject}?",
        ]
    if first == "Where":
        return [
            f"In which place {rest}?",
            f"I am looking for {subject}. Where is the right place?",
            f"To which place do I have to go because of {subject}?",
            f"Name the place: {words.clause or lower_first(words.question)}.",
        ]
    if first == "When":
        return [
            f"At what time or on which day {rest}?",
            f"I must not be late for {subject}. When is the right time?",
            f"Name the time or the date: {words.clause or lower_first(words.question)}.",
            f"How do I know the right time for {subject}?",
        ]
    if first == "How":
        return [
            f"Give me the figure: {lower_first(words.question)}",
            f"{words.asking}? I mean {subject}.",
            f"Think of {subject}: {lower_first(words.asking)}?",
        ]
    if "name of" in words.question or "called" in words.question:
        return [
            f"What do people call {subject}?",
            f"Under what name do I find {subject}?",
            f"Has {subject} got a name?",
        ]
    return [
        f"I want to understand {subject}. {words.question}",
        f"Explain it to me: {lower_first(words.question)}",
        f"Think of {subject}: {lower_first(words.question)}",
    ]


def _gaps(words: Wording) -> list[str]:
    if not words.before and not words.after:
        return []
    gap = f"{words.before} ___ {words.after}".replace(" .", ".").strip()
    return [f"Fill the gap: {gap}", *([f"Complete the sentence: {words.before} ..."] if words.before else [])]


def _backward(words: Wording) -> list[str]:
    key, named = words.named, upper_first(words.named)
    forms = [
        f"What do you know about {key}?",
        f"Tell me something about {key}.",
        f"{named}: what does that make you think of?",
        f"Somebody spoke of {key}. What did they mean?",
        f"What have you got to say about {key}?",
        f"What is the story behind {key}?",
    ]
    if words.after and not words.before:
        return [*forms, f"Complete the sentence: {key} ...", f"{named} is known for what?"]
    is_first = words.statement.lower().startswith(words.subject.lower())
    tail = words.statement[len(words.subject) :].strip() if is_first else ""
    return [
        *forms,
        *([f"Fill the gap: ___ {tail}"] if tail else []),
        f"In what matter does {key} play a part?",
    ]


def _distinct(asked: Iterable[Asked]) -> list[Asked]:
    return list(dict.fromkeys(asked))
