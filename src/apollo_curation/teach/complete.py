"""Statements whose question the served model writes, and shows that it can answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from apollo_curation.teach.writer import FACTS_AT_A_TIME, MAX_FACT_CHARS, SAID_TOKENS, Writer, unfit
from apollo_ipc.errors import UserError
from apollo_ipc.teaching.facts import Fact
from apollo_ipc.words import is_in

POSED_TOKENS = 200  # in each of two attempts
MAX_KEY_CHARS = 100


class Posed(msgspec.Struct, frozen=True):
    """As guided decoding has it."""

    question: str
    answer: str


def complete(
    writer: Writer,
    facts: Sequence[Fact],
    done: dict[int, Fact | None],
    *,
    keep: Callable[[], None],
    stop: Callable[[], bool],
) -> None:
    """Fills `done` for each of `facts` that has no question: the whole fact, None where the model makes no
    question that it answers itself with the statement in front of it. keep: is to store `done`, after each
    few facts; stop: asked before them. Raises UserError where no fact is left."""
    left = [at for at, one in enumerate(facts) if not one.question and at not in done]
    for start in range(0, len(left), FACTS_AT_A_TIME):
        if stop():
            return
        some = left[start : start + FACTS_AT_A_TIME]
        done |= dict(zip(some, _completed(writer, [facts[at] for at in some]), strict=True))
        keep()
    if all(done.get(at, one) is None for at, one in enumerate(facts)):
        raise UserError(
            "the served model makes no question of any of these statements that it answers with the "
            "statement in front of it: send them with `question` and `answer`"
        )


def _completed(writer: Writer, facts: Sequence[Fact]) -> list[Fact | None]:
    short = [one for one in facts if len(one.statement) <= MAX_FACT_CHARS]
    posed = writer.write([_prompt(one) for one in short], Posed, max_tokens=POSED_TOKENS)
    made = {one: _fact(one, found) for one, found in zip(short, posed, strict=True)}
    asked = [one for one in made.values() if one is not None]
    said = writer.say([f"{one.statement}\n\n{one.question}" for one in asked], max_tokens=SAID_TOKENS)
    right = {one for one, text in zip(asked, said, strict=True) if is_in(one.key, text)}
    return [found if (found := made.get(one)) in right else None for one in facts]


def _fact(sent: Fact, posed: Posed | None) -> Fact | None:
    """As far as words tell."""
    if posed is None:
        return None
    question, key = " ".join(posed.question.split()), sent.key or posed.answer.strip(" .!\n")
    if unfit(question) or (not sent.key and unfit(key)) or len(key) > MAX_KEY_CHARS:
        return None
    if is_in(key, question) or not is_in(key, sent.statement):
        return None
    return Fact(question, sent.statement, sent.statement, key)


def _prompt(fact: Fact) -> str:
    answer = (
        f'the answer: "{fact.key.partition("|")[0]}"'
        if fact.key
        else "the answer: a few words, copied from the statement letter by letter"
    )
    return "\n".join(
        [
            "Somebody who does not know this asks a question to which it is the answer.",
            "",
            f"Statement: {fact.statement}",
            "",
            "Write one JSON object, in the language of the statement:",
            '- "question": the question. It can be understood without the statement, and the answer does not '
            "stand in it.",
            f'- "answer": {answer}.',
        ]
    )
