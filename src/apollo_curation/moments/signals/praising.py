"""Is a user's message pleased with the answer before it?"""

from __future__ import annotations

from apollo_curation.moments import phrases
from apollo_curation.moments.phrases import plain, sentences
from apollo_curation.moments.signals.evidence import Evidence
from apollo_curation.moments.signals.turns import UserTurn

PRAISE = 0.5  # "perfect", "exactly what I needed"
PLEASURE = 0.25  # "nice", "that helps"; counted twice where two different words say it
SUCCESS = 0.35  # "it works"
TAKEN = 0.3  # "I'll use it"
THANKS = 0.15  # said out of habit
EXCLAMATION = 0.1
MAX_PRAISE_CHARS = 120  # who is pleased says so first; behind that a long message is something else
AFTER_A_REPAIR = 0.3  # what praise of the better answer adds to a correction


def weigh(praised: UserTurn, reaction: UserTurn) -> Evidence:
    evidence = Evidence()
    said, answer = plain(reaction.said)[:MAX_PRAISE_CHARS], plain(reaction.answer)
    if (
        phrases.RESERVES.search(said)
        or phrases.IS_SARCASTIC.search(said)
        or phrases.SAYS_WRONG.search(said)
        or phrases.CONCEDES.search(answer)
        or phrases.REFUSES.search(plain(praised.answer))
        or praised.answer.rstrip().endswith(("?", "？"))  # noqa: RUF001
    ):
        return evidence
    about_it = [sentence for sentence in sentences(said) if not is_of_others(sentence)]
    own = "\n".join(about_it)
    if phrases.PRAISES.search(own):
        evidence.add(PRAISE, "the user praises the answer")
    if pleased := {found[0] for found in phrases.IS_PLEASED.finditer(own)}:
        evidence.add(PLEASURE, "the user is pleased")
        if len(pleased) > 1:
            evidence.add(PLEASURE, "and says it twice")
    if phrases.REPORTS_SUCCESS.search(own):
        evidence.add(SUCCESS, "the user reports that it works")
    if phrases.TAKES_IT.search(own):
        evidence.add(TAKEN, "the user takes it as it is")
    if phrases.THANKS.search(own):
        evidence.add(THANKS, "the user says thanks")
    if "!" in own:
        evidence.add(EXCLAMATION, "with an exclamation mark")
    return evidence


def is_of_others(sentence: str) -> bool:
    """A question, or a sentence about other people and times that does not speak to the assistant."""
    if sentence.endswith(("?", "？")) or phrases.ASKS_FOR.search(sentence):  # noqa: RUF001
        return True
    return bool(phrases.IS_ABOUT_OTHERS.search(sentence) and not phrases.ADDRESSES.search(sentence))
