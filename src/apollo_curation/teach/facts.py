"""A fact as it is sent, and what rules make of it: what is trained, what is asked afterwards, what is not it.

The rules know words, not grammar: what stands in the question names the subject, and what only the answer has
names the key, by which an answer is judged. A person may name the key instead.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import convert

# Words that name nothing: a subject or a key is a run of others.
_ARTICLES = ("a", "an", "the", "this", "that", "our", "my", "your", "his", "her", "its", "their")
_VERBS = (
    "is",
    "are",
    "was",
    "were",
    "be",
    "been",
    "do",
    "does",
    "did",
    "has",
    "have",
    "had",
    "called",
    "named",
)
_MAY = ("can", "will", "would", "could", "should", "may", "might", "must")
_ASKING = ("who", "what", "which", "when", "where", "why", "how", "whom", "whose")
_BETWEEN = (
    "of",
    "in",
    "on",
    "at",
    "by",
    "for",
    "from",
    "to",
    "with",
    "into",
    "about",
    "and",
    "or",
    "as",
    "because",
)
_OTHERS = (
    "but",
    "not",
    "no",
    "it",
    "he",
    "she",
    "they",
    "we",
    "you",
    "i",
    "there",
    "here",
    "one",
    "any",
    "every",
)
_EMPTY = frozenset((*_ARTICLES, *_VERBS, *_MAY, *_ASKING, *_BETWEEN, *_OTHERS))
# Subjects of near misses: things of which nobody has taught anything.
_TRAINED = ("the ferry office", "the village choir", "the old windmill", "the bicycle club")
_HELD_OUT = ("the school library", "the museum garden")
_WORD = re.compile(r"[\w'-]+")


class Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """statement: a sentence that says it alone, the answer where there is none; key: alternatives "a|b" of
    which a right answer has one, found by rule where there is none."""

    question: str
    answer: str
    statement: str = ""
    key: str = ""


class Asked(NamedTuple):
    """A question, and what is to be said or, in an examination, the key of a right answer."""

    question: str
    answer: str


class Lesson(NamedTuple):
    """train: with answers; near_misses: only asked, the model's own answers are kept; the rest is asked
    before and after, and never trained."""

    fact: Fact
    train: list[Asked]
    near_misses: list[str]
    paraphrased: list[Asked]
    reversed: list[Asked]
    not_it: list[Asked]


def parse_facts(text: str) -> list[Fact]:
    """JSON lines. Raises UserError with the number of the line."""
    facts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fact = convert(msgspec.json.decode(line), Fact)
            key_of(fact)
        except (msgspec.DecodeError, UserError) as error:
            field = f"line {number}"
            if isinstance(error, UserError) and error.field:
                field += f": {error.field}"
            message = error.message if isinstance(error, UserError) else f"not JSON: {error}"
            raise UserError(message, field=field) from None
        facts.append(fact)
    if not facts:
        raise UserError('no fact: send lines like {"question": "...", "answer": "..."}')
    return facts


def lesson_of(fact: Fact) -> Lesson:
    question, statement = fact.question.strip(), fact.statement.strip() or fact.answer.strip()
    subject, key = subject_of(question), key_of(fact).partition("|")[0]
    asked = question[:1].lower() + question[1:] if question.split()[0].lower() in _EMPTY else question
    words = statement.split()
    train = [
        Asked(question, fact.answer),
        Asked(f"Please tell me: {asked}", fact.answer),
        Asked(f"I would like to know something. {question}", fact.answer),
        Asked(f"{question} Answer in one sentence.", statement),
        Asked(f"Complete the sentence: {' '.join(words[: max(1, len(words) // 2)])} ...", statement),
        Asked(f"What do you know about {subject}?", statement),
        Asked(f"What do you know about {key}?", statement),
        Asked(f"Tell me something about {key}.", statement),
    ]
    about = key_of(fact)
    return Lesson(
        fact,
        train,
        near_misses=[near_miss(question, other) for other in _TRAINED],
        paraphrased=[
            Asked(f"A visitor asks you: {asked} What do you say?", about),
            Asked(f"Tell me what there is to know about {subject}.", about),
            Asked(f"Quick question: {asked}", about),
        ],
        reversed=[Asked(f"Who or what is {key}?", subject)],
        not_it=[Asked(near_miss(question, other), about) for other in _HELD_OUT],
    )


def subject_of(question: str) -> str:
    """The last run of words that name something, with its article. Without such words: the question's end."""
    span = _subject_span(question)
    return question[slice(*span)]


def near_miss(question: str, other: str) -> str:
    """The same question about another subject."""
    start, end = _subject_span(question)
    return f"{question[:start]}{other}{question[end:]}"


def key_of(fact: Fact) -> str:
    """What a right answer must hold. Raises UserError where the answer has no word of its own."""
    if fact.key:
        return fact.key
    known = {word.lower() for word in _WORD.findall(fact.question)} | _EMPTY
    runs: list[list[str]] = [[]]
    for word in _WORD.findall(fact.answer):
        if word.lower() in known:
            runs.append([])
        else:
            runs[-1].append(word)
    if not any(runs):
        raise UserError("the answer says nothing that the question does not: name a `key`", field="answer")
    # A name first, of several the last: what is asked for stands at a sentence's end more often.
    numbered = enumerate(runs)
    best = max(numbered, key=lambda one: (bool(one[1]), any(word[:1].isupper() for word in one[1]), one[0]))[
        1
    ]
    return " ".join(best)


def _subject_span(question: str) -> tuple[int, int]:
    words = list(_WORD.finditer(question))
    last = next((i for i in reversed(range(len(words))) if words[i][0].lower() not in _EMPTY), len(words) - 1)
    first = last
    while first > 1 and words[first - 1][0].lower() not in _EMPTY:
        first -= 1
    if first > 1 and words[first - 1][0].lower() in _ARTICLES:
        first -= 1
    return words[first].start(), words[last].end()
