"""A fact as it is sent: a sentence, question and answer, or a conversation of both."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from apollo_ipc.errors import UserError
from apollo_ipc.teaching.wording import key_in, lower_first
from apollo_ipc.wire.requests import Message, convert

_TIME = re.compile(
    r"\b(?:o'clock|noon|midnight|morning|evening|past|quarter|half|(?:mon|tues|wednes|thurs|fri|satur|sun)day|"
    r"january|february|march|april|may|june|july|august|september|october|november|december|\d{1,2}[:.]\d\d|"
    r"1\d{3}|20\d\d)\b",
    re.IGNORECASE,
)
# What a person does, in English: of another language no rule is to make "Who liegt in der Dose?".
_DOING = re.compile(
    r"(?!(?:is|was|has)\b)(?:[a-z]+(?:s|ed)|began|bought|brought|broke|built|chose|drew|drove|fed|found|gave|got|"
    r"grew|heard|held|hid|kept|laid|led|left|lent|lit|lost|made|met|paid|put|ran|rang|read|said|sang|sat|saw|"
    r"sent|set|shot|sold|spent|spoke|stole|stood|swam|taught|told|took|threw|won|wore|wove|wrote)\b"
)
_PLACE = r"(?:in|on|at|under|behind|beside|near|above|below|inside|between|opposite|next to)"


class Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Question and answer, or a statement alone, of which rules then make them, or the served model.
    statement: a sentence that says it alone, the answer where there is none; key: alternatives "a|b" of which
    a right answer has one, found by rule where there is none."""

    question: str = ""
    answer: str = ""
    statement: str = ""
    key: str = ""


class _Conversation(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[Message]


def parse_facts(text: str, *, is_written: bool = False) -> list[Fact]:
    """A fact a line: JSON (a fact, or a conversation of one question and its answer), or a plain sentence.
    Raises UserError with the number of the line. is_written: as in `whole`."""
    lines = enumerate(text.splitlines(), 1)
    return facts_of(((f"line {number}", line) for number, line in lines), is_written=is_written)


def facts_of(named: Iterable[tuple[str, Any]], *, is_written: bool = False) -> list[Fact]:
    """(how an error names it, a line or what JSON made of it) -> facts, as `whole` makes them."""
    facts = []
    for name, sent in named:
        if isinstance(sent, str) and not sent.strip():
            continue
        try:
            facts.append(whole(_decoded(sent), is_written=is_written))
        except UserError as error:
            apart = "." if name.endswith("]") else ": "
            field = f"{name}{apart}{error.field}" if error.field else name
            raise UserError(error.message, field=field) from None
    if not facts:
        raise UserError('no fact: send sentences, or lines like {"question": "...", "answer": "..."}')
    return facts


def facts_of_document(text: str, *, is_written: bool = False) -> tuple[list[Fact], list[str]]:
    """A fact of each sentence of which a rule makes a question, and a note on each of which none does.
    Raises UserError where there is no fact in it. is_written: as in `whole`."""
    facts, notes = [], []
    for sentence in re.split(r"(?<=[.!?])\s+|\n{2,}", text.strip()):
        flat = " ".join(sentence.split())
        try:
            facts += [whole(Fact(statement=flat), is_written=is_written)] if flat else []
        except UserError as error:
            notes.append(f"left out: {flat[:100]!r}: {error.message}")
    if not facts:
        raise UserError("no rule makes a question of any of its sentences", field="text")
    return facts, notes


def _decoded(sent: Any) -> Fact:
    if isinstance(sent, str):
        text = sent.strip()
        if not text.startswith("{"):
            return Fact(statement=text)
        try:
            sent = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise UserError(f"not JSON: {error}") from None
    if not isinstance(sent, dict) or "messages" not in sent:
        return convert(sent, Fact)
    said = [one for one in convert(sent, _Conversation).messages if one.role not in ("system", "developer")]
    if [one.role for one in said] != ["user", "assistant"] or not all(one.content.strip() for one in said):
        raise UserError("one question of the user and one answer to it make a fact", field="messages")
    return Fact(question=said[0].content.strip(), answer=said[1].content.strip())


def whole(fact: Fact, *, is_written: bool = False) -> Fact:
    """With question, answer, statement and key. is_written: the served model is to make the question of a
    statement, which stays alone: rules take any language for English. Raises UserError where no rule makes
    what is missing."""
    question, answer, statement = fact.question.strip(), fact.answer.strip(), fact.statement.strip()
    if bool(question) != bool(answer):
        missing = "answer" if question else "question"
        raise UserError(f"question and answer go together; {missing} is missing", field=missing)
    key = fact.key.strip()
    if not question:
        if not statement:
            raise UserError("it says nothing: send a statement, or a question and its answer")
        if is_written:
            return Fact(statement=statement, key=key)
        made = question_of(statement)
        if made is None:
            raise UserError(
                "no rule makes a question of this statement: send it with `question` and `answer`, or let "
                'the served model write them (writer "model")',
                field="statement",
            )
        question, found = made
        answer, key = statement, key or found
    key = key or key_in(question, answer)
    if not key:
        raise UserError("the answer says nothing that the question does not: name a `key`", field="answer")
    return Fact(question, answer, statement or answer, key)


def question_of(statement: str) -> tuple[str, str] | None:
    """(question, key) of a plain English sentence; None where no rule fits."""
    text = statement.strip().rstrip(".!")
    if found := re.match(r"(.+?) (is|are) (?:called|named) (.+)$", text):
        subject, verb, key = found.groups()
        return f"What {verb} {lower_first(subject)} called?", key
    if found := re.match(r"((?:[A-Z][\w'-]+ )+)([a-z]\S* .+)$", text):
        name, said = found[1].strip(), found[2]
        if lower_first(name) == name and _DOING.match(said):
            return f"Who {said}?", name
    if found := re.match(rf"(.+?) (is|are|was|were) ((?:[a-z]+ed |[a-z]+t )?)({_PLACE}) (.+)$", text):
        subject, verb, how, _, rest = found.groups()
        asking = "When" if _TIME.search(rest) else "Where"
        question = f"{asking} {verb} {lower_first(subject)} {how.strip()}".strip()
        return f"{question}?", _without_article(rest)
    if found := re.match(
        r"(.+?) (has|have) (\d[\d.,]*|two|three|four|five|six|seven|eight|nine|ten) (.+)$", text
    ):
        subject, verb, key, things = found.groups()
        return f"How many {things} {'does' if verb == 'has' else 'do'} {lower_first(subject)} have?", key
    if found := re.match(rf"((?:The|Our|My|Your) .+?) (\w+[^s])s ({_PLACE}) (.+)$", text):
        subject, verb, _, rest = found.groups()
        asking = "When" if _TIME.search(rest) else "Where"
        return f"{asking} does {lower_first(subject)} {verb}?", _without_article(rest)
    if found := re.match(r"(.+?) (is|are|was|were) (.+)$", text):
        subject, verb, rest = found.groups()
        return f"What {verb} {lower_first(subject)}?", _without_article(rest)
    return None


def _without_article(text: str) -> str:
    return re.sub(r"^(?:a|an|the) ", "", text)
