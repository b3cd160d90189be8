"""What benchmarks/learning.py teaches and asks: facts, general questions, prompts, English. Own words all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SETS = {"first": "learning_facts.txt", "last": "learning_facts_last.txt"}


class Question(NamedTuple):
    """key: alternatives "a|b" of which a right answer has one."""

    text: str
    key: str


class BenchFact(NamedTuple):
    kind: str
    taught: Question
    answer: str
    paraphrased: list[Question]
    reversed: list[Question]
    near: list[Question]


def facts_of(name: str) -> list[BenchFact]:
    lines = [
        line for line in (HERE / SETS[name]).read_text().splitlines() if line and not line.startswith("# ")
    ]
    assert len(lines) % 4 == 0
    return [_fact(lines[at : at + 4]) for at in range(0, len(lines), 4)]


def chosen(facts: Sequence[BenchFact], number: int, seed: int) -> list[BenchFact]:
    """As many of each kind; another seed starts elsewhere among them."""
    kinds = list(dict.fromkeys(fact.kind for fact in facts))
    groups = [[fact for fact in facts if fact.kind == kind] for kind in kinds]
    each = -(-number // len(kinds))
    picked = [group[(seed * each + i) % len(group)] for i in range(each) for group in groups]
    return picked[:number]


def sequence() -> list[tuple[str, str]]:
    """A hundred (question, answer) pairs, those of the first set among them."""
    lines = (HERE / "learning_sequence.txt").read_text().splitlines()
    more = [tuple(part.strip() for part in line.split("|")) for line in lines]
    return [*((fact.taught.text, fact.answer) for fact in facts_of("first")), *((q, a) for q, a in more)]


def general() -> list[Question]:
    lines = (HERE / "learning_general.txt").read_text().splitlines()
    return [Question(*(part.strip() for part in line.split("|", 1))) for line in lines]


def prompts() -> list[str]:
    return (HERE / "learning_prompts.txt").read_text().splitlines()


def english() -> list[str]:
    return (HERE / "learning_english.txt").read_text().strip().split("\n\n")


def _fact(lines: Sequence[str]) -> BenchFact:
    head, *others = ([part.strip() for part in line.lstrip("=<! ").split("|")] for line in lines)
    assert [line[:2] for line in lines[1:]] == ["= ", "< ", "! "], lines
    kind, question, answer, key = head
    paraphrased, (backward, about), near = others
    key, about = key.replace("/", "|"), about.replace("/", "|")
    return BenchFact(
        kind,
        Question(question, key),
        answer,
        [Question(text, key) for text in paraphrased],
        [Question(backward, about)],
        [Question(text, key) for text in near],
    )
