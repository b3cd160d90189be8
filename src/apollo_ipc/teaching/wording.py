"""Words of a question and its answer: subject, key, and the clause that asks the same inside a sentence.

Rules know words, not grammar: what the statement and the question both begin with is the subject, what only
the answer has is the key. English; of other languages only what needs no word lists is made.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ARTICLES = ("a", "an", "the", "this", "that", "these", "our", "my", "your", "his", "her", "its", "their")
_AUXILIARIES = (
    *("is", "are", "was", "were", "do", "does", "did", "has", "have", "had"),
    *("can", "will", "would", "could", "should", "may", "might", "must"),
)
_VERBS = ("be", "been", "called", "named")
ASKING = ("who", "what", "which", "when", "where", "why", "how", "whom", "whose")
_PREPOSITIONS = (
    *(
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
        "behind",
        "under",
        "beside",
    ),
    *("before", "after", "near", "between", "over", "above", "below", "against"),
)
_OTHERS = (
    *("and", "or", "as", "because", "but", "not", "no", "it", "he", "she", "they", "we", "you", "i"),
    *("there", "here", "one", "any", "every"),
)
_PRONOUNS = ("we", "i", "they", "you", "he", "she", "it")
_PARTICLES = ("off", "up", "down", "out", "away")
EMPTY = frozenset((*ARTICLES, *_AUXILIARIES, *_VERBS, *ASKING, *_PREPOSITIONS, *_OTHERS))
_WORD = re.compile(r"[\w'-]+")


class Wording(NamedTuple):
    """subject: as the question has it; key: as the statement has it; named: with its article; asking: "how
    many steps"; rest: what follows it in the question; clause: "how many steps the tower has", empty where no
    rule makes one; before, after: what the statement has before and after the key, both empty where it does
    not have it."""

    question: str
    statement: str
    subject: str
    key: str
    named: str
    asking: str
    rest: str
    clause: str
    before: str
    after: str


def wording(question: str, statement: str, key: str) -> Wording:
    asking, rest = _asking(question)
    at = statement.find(key)
    before, after = ("", "") if at < 0 else (statement[:at].strip(), statement[at + len(key) :].strip())
    subject = subject_of(question, statement)
    article = before.rpartition(" ")[2].lower()
    named = f"{article} {key}" if article in ARTICLES else key
    clause = _clause(question, asking, rest, before, after, subject) if at >= 0 else ""
    return Wording(question, statement, subject, key, named, asking, rest, clause, before, after)


def subject_of(question: str, statement: str = "") -> str:
    """What the statement begins with, as far as the question has it; else the last words of the question
    that name something, with their article."""
    if shared := _shared_beginning(question, statement):
        return shared
    words = list(_WORD.finditer(question))
    if not words:
        return question
    named = [word[0].lower() not in EMPTY for word in words]
    last = next((i for i in reversed(range(len(words))) if named[i]), len(words) - 1)
    first = last
    while True:
        while first > 1 and named[first - 1]:
            first -= 1
        start = first - 1 if first > 1 and words[first - 1][0].lower() in ARTICLES else first
        if start > 2 and words[start - 1][0].lower() == "of" and named[start - 2]:
            first = start - 2  # "the song of our choir" is one thing
            continue
        return question[words[start].start() : words[last].end()]


def near_miss(question: str, subject: str, other: str) -> str:
    """The same question about another subject."""
    return question.replace(subject, other, 1)


def key_in(question: str, answer: str) -> str:
    """The words that only the answer has: a name if there is one, else the last ones; "" for none."""
    known = {_stem(word) for word in _WORD.findall(question)}
    words = list(_WORD.finditer(answer))
    own = [word[0].lower() not in EMPTY and _stem(word[0]) not in known for word in words]
    for i in range(1, len(words) - 1):  # "ninth of November", "quarter to nine"
        if words[i][0].lower() in ("of", "to") and own[i - 1] and own[i + 1]:
            own[i] = True
    runs: list[list[re.Match[str]]] = [[]]
    for word, is_own in zip(words, own, strict=True):
        runs[-1].append(word) if is_own else runs.append([])
    found = [run for run in runs if run]
    if not found:
        return ""
    first = words[0].start()
    numbered = enumerate(found)
    _, best = max(numbered, key=lambda one: (any(_is_name(word, first) for word in one[1]), one[0]))
    return answer[best[0].start() : best[-1].end()]


def lower_first(text: str) -> str:
    """For the middle of a sentence: a name stays as it is."""
    first = _WORD.match(text)
    return text[:1].lower() + text[1:] if first and first[0].lower() in EMPTY else text


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _is_name(word: re.Match[str], first: int) -> bool:
    return word[0][:1].isupper() and (word.start() != first or word[0].lower() not in EMPTY)


def _stem(word: str) -> str:
    return re.sub(r"(?<=\w{3})(?:e?s|e?d|ing)$", "", word.lower())


def _asking(question: str) -> tuple[str, str]:
    """("How many steps", "does the tower have"); all in the first where no auxiliary stands."""
    text = question.strip().rstrip("?!. ")
    for word in _WORD.finditer(text):
        if word[0].lower() in _AUXILIARIES and word.start():
            return text[: word.start()].strip(), text[word.start() :]
    return text, ""


def _clause(question: str, asking: str, rest: str, before: str, after: str, subject: str) -> str:
    first = asking.partition(" ")[0].lower()
    if first not in ASKING or first == "why" or "," in asking:
        return ""
    if not before:  # the answer begins with the key: "who runs the night shift"
        return lower_first(question.strip().rstrip("?!. ")) if not rest or first == "who" else ""
    words = before.split()
    if first in ("where", "when"):  # what leads to the place or the time belongs to the answer
        start = len(subject.split()) if before.lower().startswith(subject.lower()) else 0
        leads = (i for i in range(start, len(words)) if words[i].lower() in (*_PREPOSITIONS, "every"))
        words = words[: next(leads, len(words))]
    while words and words[-1].lower() in ARTICLES:
        words.pop()
    behind = _WORD.findall(after)
    if first in ("what", "which") and all(word in _WORD.findall(question) for word in behind):
        words += behind
    return f"{lower_first(asking)} {lower_first(' '.join(words))}" if words else ""


def _shared_beginning(question: str, statement: str) -> str:
    said = [word.lower() for word in _WORD.findall(statement)]
    asked = list(_WORD.finditer(question))
    if not said or said[0] in _PRONOUNS:
        return ""
    best: list[re.Match[str]] = []
    for start in range(1, len(asked)):
        run = []
        for word, other in zip(asked[start:], said, strict=False):
            if word[0].lower() != other or (run and other in (*_AUXILIARIES, *_VERBS)):
                break
            run.append(word)
        best = max(best, run, key=len)
    is_do = bool(best) and question[: best[0].start()].lower().split()[-1] == "do"
    if is_do and best[-1].end() >= asked[-1].start():  # with the verb: "the lamps go off"
        while best and best[-1][0].lower() in _PARTICLES:
            best.pop()
        best.pop() if len(best) > 2 else None
    elif is_do and len(best) > 2 and best[-1][0].lower() not in EMPTY:
        best.pop()
    if all(word[0].lower() in EMPTY for word in best):
        return ""
    return question[best[0].start() : best[-1].end()]
