"""The served model as a second source of forms: with a fact in front of it, it writes what may be asked.

Only questions are its own. What is trained to be said to them are the words of whoever sent the fact, so
nothing that the model makes up is taught. A question is kept where the model's own answers say that it asks
for the fact: right with the fact in front of it, wrong without.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import Meta

from apollo_curation.teach.job import Learner
from apollo_curation.teach.variants import Asked, Lesson
from apollo_curation.teach.written import Written, in_front, is_of_rules, subject_of
from apollo_ipc.words import is_in

MIN_ABILITY = 0.8  # share of questions about a fact in front of it that an able writer answers
MIN_YIELD = 0.25  # of the forms that it was asked for
FACTS_ASKED = 12  # to see what it can do, at most
ASKED_AT_A_TIME = 10  # questions
FACTS_AT_A_TIME = 4
WRITE_TOKENS = 900  # of all forms of a fact, in each of two attempts
SAID_TOKENS = 32
MAX_CHARS = 240  # of a form
MAX_FACT_CHARS = 2000  # of a fact that is put in front of the model
NUM_QUESTIONS, NUM_SITUATIONS, NUM_SENTENCES, NUM_REVERSED, NUM_NEAR = 6, 3, 3, 4, 6
NUM_FORWARD = NUM_QUESTIONS + NUM_SITUATIONS + NUM_SENTENCES
_LEAST_ALONE = 4  # forms, where those of the rules are left out: two are trained, two are only asked
_ODD = re.compile(r"[<>|\[\]{}]")  # control tokens of chat templates are written with these

T = TypeVar("T", bound=msgspec.Struct)
Kind = Literal["forward", "backward", "near"]
Texts = Annotated[list[str], Meta(max_length=12)]


class Writer(Learner, Protocol):
    def write(self, prompts: Sequence[str], kind: type[T], *, max_tokens: int) -> list[T | None]:
        """JSON of this kind for each; None: it could not be read, or the server would not."""
        ...


class Drafts(msgspec.Struct, frozen=True):
    """What the model is asked for, as guided decoding has it."""

    questions: Texts
    situations: Texts
    sentences: Texts
    reversed: Texts
    near_misses: Texts


class Writing(msgspec.Struct):
    """How a job's forms were made. reason: why by rules alone; ability, ability_reversed: share of the rules'
    questions that the model answers with the fact in front of it, None: not asked; num_facts: for which it
    wrote; num_kept: of its forms; dropped: how many for which reason."""

    source: Literal["rules", "model"] = "rules"
    reason: str = ""
    ability: float | None = None
    ability_reversed: float | None = None
    num_facts: int = 0
    num_kept: int = 0
    dropped: dict[str, int] = {}

    @property
    def wants_reversed(self) -> bool:
        """Where rules made no reversed question to ask, each one's own check decides."""
        return self.ability_reversed is None or self.ability_reversed >= MIN_ABILITY

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class Draft(NamedTuple):
    """answer: the key of a right answer; of a near miss, of a wrong one."""

    at: int
    kind: Kind
    question: str
    answer: str


def write_forms(
    writer: Writer,
    lessons: Sequence[Lesson],
    some: Sequence[int],
    forms: dict[int, Written],
    made: Writing | None,
    *,
    choice: str,
    seed: int,
    keep: Callable[[Writing], None],
    stop: Callable[[], bool],
) -> Writing:
    """Fills `forms` for `some` of the lessons, as far as the served model is to write. made: how far it was
    before a crash. keep: is to store where it stands. stop: asked before each few facts."""
    if made is None:
        made = begin(writer, lessons, choice, seed)
        keep(made)
    while made.source == "model" and not stop():
        left = [at for at in some if at not in forms][:FACTS_AT_A_TIME]
        if not left:
            break
        forms |= write(writer, lessons, left, made)
        if choice == "auto" or not made.num_kept:
            judge_yield(made, forms)
        keep(made)
    return made


# --- which source ---


def begin(learner: Learner, lessons: Sequence[Lesson], choice: str, seed: int) -> Writing:
    """Who writes the forms of these lessons. choice: "rules", "model", or "auto": by what the model answers
    with a fact in front of it, in the rules' own words."""
    short = [one for one in lessons if _is_short(one)]
    if choice != "auto" or not short:
        return Writing("model" if choice == "model" and short else "rules")
    rng = random.Random(seed)
    forward: list[tuple[Lesson, Asked]] = []
    backward: list[tuple[Lesson, Asked]] = []
    for one in rng.sample(short, min(FACTS_ASKED, len(short))):
        key, subject = one.fact.key, subject_of(one)
        if not is_of_rules(one.fact):
            forward.append((one, Asked(one.fact.question, key)))
            continue
        some = rng.sample(one.forward[1:], min(2, len(one.forward) - 1))
        forward += [(one, Asked(asked.question, key)) for asked in (*one.paraphrased, *some)]
        backward += [(one, Asked(asked.question, subject)) for asked in (*one.reversed, *one.backward[:1])]
    right, num_asked = _num_right(learner, forward)
    made = Writing("model", "", right / num_asked)
    if right / num_asked < MIN_ABILITY:
        _rules_alone(
            made,
            f"the served model answers {right} of {num_asked} questions about a fact that stands in front "
            "of it",
        )
        return made
    right_reversed, num_reversed = _num_right(learner, backward)
    made.ability_reversed = right_reversed / num_reversed if num_reversed else None
    if not made.wants_reversed:
        made.reason = (
            f"reversed forms are the rules' alone: the served model answers {right_reversed} of "
            f"{num_reversed} reversed questions about a fact that stands in front of it"
        )
    return made


def judge_yield(made: Writing, forms: dict[int, Written]) -> None:
    """Leaves it to the rules, where too little of what the model wrote was kept; `forms` then is empty."""
    wanted = made.num_facts * (NUM_FORWARD + NUM_REVERSED * made.wants_reversed)
    kept = sum(len(one.forward) + len(one.paraphrased) for one in forms.values())
    kept += sum(len(one.backward) + len(one.reversed) for one in forms.values())
    if kept < MIN_YIELD * wanted:
        _rules_alone(
            made, f"of {wanted} forms that the served model was asked for, {kept} pass its own check"
        )
        forms.clear()


def _rules_alone(made: Writing, why: str) -> None:
    made.source, made.reason, made.num_kept = "rules", f"{why}: rules alone", 0


def _num_right(learner: Learner, asked: Sequence[tuple[Lesson, Asked]]) -> tuple[int, int]:
    """How many are answered right, and how many were asked: no more, where the rest cannot make it able."""
    right = wrong = 0
    for start in range(0, len(asked), ASKED_AT_A_TIME):
        some = asked[start : start + ASKED_AT_A_TIME]
        said = learner.say([in_front(one, question) for one, (question, _) in some], max_tokens=SAID_TOKENS)
        num = sum(is_in(one.answer, text) for (_, one), text in zip(some, said, strict=True))
        right, wrong = right + num, wrong + len(some) - num
        if (len(asked) - wrong) / len(asked) < MIN_ABILITY:
            break
    return right, right + wrong


# --- writing ---


def write(
    writer: Writer, lessons: Sequence[Lesson], some: Sequence[int], made: Writing
) -> dict[int, Written]:
    """The kept forms of these lessons, by their numbers; `made` counts what was dropped."""
    short = [at for at in some if _is_short(lessons[at])]
    prompts = [_prompt(lessons[at], made) for at in short]
    drafts: list[Draft] = []
    for at, found in zip(short, writer.write(prompts, Drafts, max_tokens=WRITE_TOKENS), strict=True):
        if found is None:
            made.drop("no JSON that could be read")
            continue
        drafts += _plausible(at, lessons, found, made)
    kept = _checked(writer, lessons, drafts, made)
    made.num_facts += len(short)
    made.num_kept += len(kept)
    return {at: _written(lessons[at], [one for one in kept if one.at == at]) for at in some}


def _prompt(lesson: Lesson, made: Writing) -> str:
    fact, subject = lesson.fact, subject_of(lesson)
    key = fact.key.partition("|")[0]
    reversed_forms = (
        f'- "reversed": {NUM_REVERSED} questions that name "{key}" and to which "{subject}" belongs in the '
        f'answer. "{subject}" does not stand in them.'
        if made.wants_reversed
        else '- "reversed": an empty list.'
    )
    return "\n".join(
        [
            "Somebody is to learn this fact so well that they can tell it to anybody who asks, however.",
            "",
            f"Fact: {fact.statement}",
            f"Question: {fact.question}",
            f"Answer: {key}",
            "",
            "Write what other people would ask, as one JSON object of five lists. Use the language of the "
            "fact. Each text is short, differs from all others and can be understood without the fact.",
            f'- "questions": {NUM_QUESTIONS} questions that ask for the same in other words. None of them '
            f'has "{key}" in it.',
            f'- "situations": {NUM_SITUATIONS} times two sentences of somebody who is in need of the fact: '
            f'what happened, and a question that "{key}" answers. "{key}" does not stand in them.',
            f'- "sentences": {NUM_SENTENCES} sentences that say the fact in other words. Each has "{key}" in '
            "it, letter by letter.",
            reversed_forms,
            f'- "near_misses": {NUM_NEAR} questions of the same form about something else, of which the fact '
            "says nothing.",
        ]
    )


def _plausible(at: int, lessons: Sequence[Lesson], found: Drafts, made: Writing) -> Iterator[Draft]:
    """What can be a form as far as words tell."""
    lesson = lessons[at]
    key, subject = lesson.fact.key, subject_of(lesson)
    others = [subject_of(one) for number, one in enumerate(lessons) if number != at]
    taken = {_plain(text) for text in _questions_of(lesson)}
    asked = [*found.questions[:NUM_QUESTIONS], *found.situations[:NUM_SITUATIONS]]
    for sentence in found.sentences[:NUM_SENTENCES]:
        gap = re.sub(_words(key), "___", sentence, flags=re.IGNORECASE)
        asked.append(gap if gap != sentence else "")
    texts: list[tuple[Kind, str]] = [("forward", text) for text in asked]
    texts.extend(("backward", text) for text in found.reversed[:NUM_REVERSED] if made.wants_reversed)
    texts.extend(("near", text) for text in found.near_misses[:NUM_NEAR])
    for kind, written in texts:
        text = " ".join(written.split())
        if why := unfit(text):
            made.drop(why)
        elif _plain(text) in taken:
            made.drop("there already")
        elif is_in(subject if kind == "backward" else key, text):
            made.drop("names its own answer")
        elif kind == "backward" and not is_in(key, text):
            made.drop("reversed, and does not name the key")
        elif kind == "near" and any(is_in(other, text) for other in others):
            made.drop("a near miss about another fact of the job")
        else:
            taken.add(_plain(text))
            yield Draft(at, kind, text, subject if kind == "backward" else key)


def unfit(text: str) -> str:
    """Why this cannot be a question at all; empty: it can."""
    if not re.search(r"\w", text) or len(text) > MAX_CHARS:
        return "empty or too long"
    return "signs that no question has" if _ODD.search(text) or not text.isprintable() else ""


def _checked(
    learner: Learner, lessons: Sequence[Lesson], drafts: Sequence[Draft], made: Writing
) -> list[Draft]:
    """Those that the model's own answers confirm, in their order."""
    with_it = learner.say([in_front(lessons[one.at], one.question) for one in drafts], max_tokens=SAID_TOKENS)
    near, asking = [], []
    for one, said in zip(drafts, with_it, strict=True):
        if one.kind == "near":
            near.append(one) if not is_in(one.answer, said) else made.drop(
                "a near miss that the fact answers"
            )
        else:
            asking.append(one) if is_in(one.answer, said) else made.drop("wrong with the fact in front of it")
    without = learner.say([one.question for one in asking], max_tokens=SAID_TOKENS)
    kept = []
    for one, said in zip(asking, without, strict=True):
        made.drop("right without the fact") if is_in(one.answer, said) else kept.append(one)
    return [*kept, *near]


def _written(lesson: Lesson, kept: Sequence[Draft]) -> Written:
    forward, backward, near = (
        [one.question for one in kept if one.kind == kind] for kind in ("forward", "backward", "near")
    )
    if is_of_rules(lesson.fact) or len(forward) < _LEAST_ALONE:
        return Written(forward, backward, near)
    few, some = int(len(backward) > 1), 2 * (len(near) > 3)
    return Written(forward[2:], backward[few:], near[some:], True, forward[:2], backward[:few], near[:some])


def _questions_of(lesson: Lesson) -> Iterator[str]:
    groups = (lesson.forward, lesson.backward, lesson.paraphrased, lesson.reversed, lesson.not_it)
    yield from (asked.question for group in groups for asked in group)
    yield from lesson.near_misses


def _is_short(lesson: Lesson) -> bool:
    return len(lesson.fact.statement) + len(lesson.fact.question) <= MAX_FACT_CHARS


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _words(key: str) -> str:
    alternatives = "|".join(re.escape(one) for one in key.split("|"))
    return rf"(?<!\w)(?:{alternatives})(?!\w)"
