"""Does a user's message correct the answer before it?"""

from __future__ import annotations

import re

from apollo_curation.moments import phrases
from apollo_curation.moments.phrases import plain
from apollo_curation.moments.signals.evidence import Evidence, likeness, overlap, words
from apollo_curation.moments.signals.refusing import is_refusal
from apollo_curation.moments.signals.turns import UserTurn

PLAINLY_WRONG = 0.55  # "that's wrong", "I asked for ..."
OBJECTION = 0.3  # "no", "isn't it ...", which may as well begin something else
REMARK = 0.2  # a statement where a new wish could stand
ECHO = 0.3  # a piece of the answer with a question mark: "Bacon?"
CONCESSION = 0.45  # "you're right, my mistake"
SAME_AGAIN = 0.25  # the next answer is the first one with a change
TAKEN_UP = 0.15  # what the user brought in stands in the next answer
ASKED_BEFORE = 0.15  # the user repeats words of his request
MIN_LIKENESS = 0.5
MIN_REPEATED = 0.3
CHANGED_WISH = 0.6  # "now make it ...": the wish is new, the answer was not wrong
UNANSWERED = 0.2  # nobody has answered the correction

# Numbers, and words with a capital letter that do not begin a sentence.
_NOTABLE = re.compile(r"\d+(?:[.,:]\d+)*|(?<=[\w,;:] )[A-ZÄÖÜ]\w{2,}")


def weigh(wrong: UserTurn, reaction: UserTurn) -> Evidence:
    evidence = Evidence()
    said, answer = plain(reaction.said), plain(reaction.answer)
    if (
        wrong.final is None
        or is_refusal(wrong)
        or phrases.CORRECTS_HIMSELF.search(said)
        or is_own_answer(wrong, reaction)
    ):
        return evidence
    concedes = phrases.CONCEDES.search(answer) is not None
    if not concedes and stands_by_it(wrong, reaction):
        return evidence
    if phrases.SAYS_WRONG.search(said):
        evidence.add(PLAINLY_WRONG, "the user says that the answer was wrong")
    elif phrases.OBJECTS.search(said):
        evidence.add(OBJECTION, "the user objects")
    elif is_remark(said):
        evidence.add(REMARK, "the user remarks on the answer")
    if is_echo(reaction.said, wrong.answer):
        evidence.add(ECHO, "the user asks back with the answer's own words")
    if concedes:
        evidence.add(CONCESSION, "the assistant concedes it")
    if evidence.confidence == 0:
        return evidence  # a series of questions alike has answers alike, too
    if likeness(wrong.answer, reaction.answer) >= MIN_LIKENESS and reaction.answer != wrong.answer:
        evidence.add(SAME_AGAIN, "the next answer is the first one with a change")
    if brought_in(wrong, reaction) & notable(reaction.answer):
        evidence.add(TAKEN_UP, "the next answer takes up what the user said")
    if overlap(words(reaction.said), words(wrong.said)) >= MIN_REPEATED:
        evidence.add(ASKED_BEFORE, "the user repeats what was asked for")
    if phrases.REFINES.search(said) and not phrases.SAYS_WRONG.search(said):
        evidence.doubt(CHANGED_WISH, "it may be a new wish")
    if not reaction.steps:
        evidence.doubt(UNANSWERED, "nobody has answered it")
    return evidence


def is_own_answer(before: UserTurn, reaction: UserTurn) -> bool:
    """Whether the user only answers the assistant's question: "Outside? - No, inside.\""""
    return before.answer.rstrip().endswith("?") and not phrases.CONCEDES.search(plain(reaction.answer))


def is_remark(said: str) -> bool:
    """Whether the message states something: neither a question nor a wish, nor thanks."""
    return "?" not in said and bool(phrases.STATES.search(said)) and not is_wish(said)


def is_wish(said: str) -> bool:
    return bool(phrases.REFINES.search(said) or phrases.MOVES_ON.search(said) or phrases.THANKS.search(said))


def is_echo(said: str, answer: str) -> bool:
    """Whether the message begins by asking back with one or two words of the answer."""
    match = re.match(r"\s*([\w.,:% ]{2,40})\?", said)
    if match is None:
        return False
    asked = words(match[1])
    return 0 < len(asked) <= 3 and asked <= words(answer)


def stands_by_it(wrong: UserTurn, reaction: UserTurn) -> bool:
    """Whether the assistant keeps to what it said: in words, or by saying the same thing again without
    anything of what the user brought in."""
    if phrases.STANDS.search(plain(reaction.answer)):
        return True
    claimed = notable(wrong.answer) - notable(wrong.said)
    new = brought_in(wrong, reaction)
    again = notable(reaction.answer)
    return bool(claimed & again and new and not new & again)


def brought_in(wrong: UserTurn, reaction: UserTurn) -> set[str]:
    """Numbers and names that the user's reaction is the first to mention."""
    return notable(reaction.said) - notable(wrong.answer) - notable(wrong.said)


def notable(text: str) -> set[str]:
    return {found.lower() for found in _NOTABLE.findall(text)}
