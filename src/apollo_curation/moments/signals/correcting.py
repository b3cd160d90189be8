"""Does a user's message correct the answer before it?"""

from __future__ import annotations

import re

from apollo_curation.moments import phrases
from apollo_curation.moments.phrases import plain
from apollo_curation.moments.signals.evidence import Evidence, likeness, num_words, overlap, words
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
FAULT = 0.4  # "this returns the oldest ones"
INSISTS = 0.4  # a few words of the request, said again: "Friday!"
SAYS_OTHERWISE = 0.25  # a few words that neither request nor answer has: "seven"
ABOUT_IT = 0.1  # a statement with words of the answer: "Collins stayed in orbit"
MAX_FEW_WORDS = 4
MAX_FEW_CHARACTERS = 8  # of Chinese and Japanese, where each counts as a word
MAX_COMPLAINT_CHARS = 300  # who complains does so at once; behind that a long message is something else
MAX_OBJECTION_CHARS = 120  # likewise where the words are weaker
MAX_CONCESSION_CHARS = 250  # of the next answer
MAX_SHORT_WORDS = 25  # from there on two messages share words whatever they say
CHANGED_WISH = 0.6  # "now make it ...": the wish is new, the answer was not wrong
UNANSWERED = 0.2  # nobody has answered the correction

# Numbers, and words with a capital letter that do not begin a sentence.
_NOTABLE = re.compile(r"\d+(?:[.,:]\d+)*|(?<=[\w,;:] )[A-ZÄÖÜ]\w{2,}")


def weigh(wrong: UserTurn, reaction: UserTurn) -> Evidence:
    evidence = Evidence()
    said, answer = plain(reaction.said)[:MAX_COMPLAINT_CHARS], plain(reaction.answer)
    is_short = len(reaction.said) <= MAX_COMPLAINT_CHARS and num_words(said) <= MAX_SHORT_WORDS
    if (
        wrong.final is None
        or is_refusal(wrong)
        or phrases.CORRECTS_HIMSELF.search(said)
        or is_own_answer(wrong, reaction)
    ):
        return evidence
    concedes = phrases.CONCEDES.search(answer[:MAX_CONCESSION_CHARS]) is not None
    if phrases.SAYS_WRONG.search(said):
        evidence.add(PLAINLY_WRONG, "the user says that the answer was wrong")
    elif phrases.OBJECTS.search(said[:MAX_OBJECTION_CHARS]):
        evidence.add(OBJECTION, "the user objects")
    elif is_short and is_remark(said):
        evidence.add(REMARK, "the user remarks on the answer")
    if (
        phrases.REPORTS_FAULT.search(said[:MAX_OBJECTION_CHARS])
        and not is_question(said)
        and not is_wish(said)
    ):
        evidence.add(FAULT, "the user says what it does wrong")
    if is_short:
        _weigh_few_words(wrong, reaction, said, evidence)
    if is_echo(reaction.said, wrong.answer):
        evidence.add(ECHO, "the user asks back with the answer's own words")
    if concedes:
        evidence.add(CONCESSION, "the assistant concedes it")
    if evidence.confidence == 0:
        return evidence  # a series of questions alike has answers alike, too
    if not concedes and stands_by_it(wrong, reaction):
        return Evidence()
    if likeness(wrong.answer, reaction.answer) >= MIN_LIKENESS and reaction.answer != wrong.answer:
        evidence.add(SAME_AGAIN, "the next answer is the first one with a change")
    if is_short and (brought_in(wrong, reaction) & notable(reaction.answer) or _takes_up(wrong, reaction)):
        evidence.add(TAKEN_UP, "the next answer takes up what the user said")
    if is_short and overlap(words(reaction.said), words(wrong.said)) >= MIN_REPEATED:
        evidence.add(ASKED_BEFORE, "the user repeats what was asked for")
    if phrases.REFINES.search(said) and not phrases.SAYS_WRONG.search(said):
        evidence.doubt(CHANGED_WISH, "it may be a new wish")
    if not reaction.steps:
        evidence.doubt(UNANSWERED, "nobody has answered it")
    return evidence


def _weigh_few_words(wrong: UserTurn, reaction: UserTurn, said: str, evidence: Evidence) -> None:
    """Of a message too short for phrases: what it has in common with request and answer."""
    if is_question(said) or is_wish(said) or phrases.PRAISES.search(said) or phrases.IS_PLEASED.search(said):
        return
    own, asked, answered = words(said), words(wrong.said), words(wrong.answer)
    if not own:
        return
    limit = MAX_FEW_CHARACTERS if any(ord(letter) > 0x3000 for letter in said) else MAX_FEW_WORDS
    if num_words(said) <= limit:
        again = own & asked - answered
        is_loud = "!" in said or any(len(word) > 2 and word.isupper() for word in reaction.said.split())
        if again and (is_loud or num_words(said) <= 2) and overlap(own, asked) >= MIN_REPEATED:
            evidence.add(INSISTS, "the user says a word of the request again")
        elif own - asked - answered and (evidence.confidence or any(word[0].isdigit() for word in own)):
            evidence.add(SAYS_OTHERWISE, "the user says something else in few words")
        elif own - asked - answered and words(reaction.answer) & (own - asked - answered):
            evidence.add(SAYS_OTHERWISE, "the user answers it himself, and the assistant follows")
    if own & answered and (evidence.confidence or phrases.STATES.search(said)):
        evidence.add(ABOUT_IT, "the user speaks of what is in the answer")


def _takes_up(wrong: UserTurn, reaction: UserTurn) -> bool:
    new = words(reaction.said) - words(wrong.said) - words(wrong.answer)
    return bool(new & words(reaction.answer))


def is_question(said: str) -> bool:
    return said.rstrip().endswith(("?", "？"))  # noqa: RUF001


def is_own_answer(before: UserTurn, reaction: UserTurn) -> bool:
    """Whether the user only answers the assistant's question: "Outside? - No, inside.\""""
    return is_question(before.answer) and not phrases.CONCEDES.search(plain(reaction.answer))


def is_remark(said: str) -> bool:
    """Whether the message states something: neither a question nor a wish, nor thanks."""
    has_mark = any(mark in said for mark in "?？")  # noqa: RUF001
    return not has_mark and bool(phrases.STATES.search(said)) and not is_wish(said)


def is_wish(said: str) -> bool:
    return bool(
        phrases.REFINES.search(said)
        or phrases.ASKS_FOR.search(said)
        or phrases.MOVES_ON.search(said)
        or phrases.THANKS.search(said)
    )


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
