"""Was a harmless request refused, and helped with when the user explained himself?"""

from __future__ import annotations

from apollo_curation.moments import phrases
from apollo_curation.moments.phrases import plain
from apollo_curation.moments.signals.evidence import Evidence, overlap, words
from apollo_curation.moments.signals.turns import UserTurn

HELPED_AFTER_ALL = 0.2  # the next answer is no refusal: it may be about something else
EXPLANATION = 0.3  # "it's for my class", "I need ..."
SAME_MATTER = 0.2  # what follows is about what was asked
CONCESSION = 0.25  # "you're right", "thanks for the context"
MIN_OVERLAP = 0.1
MAX_REFUSAL_CHARS = 400  # a longer answer says more than no


def is_refusal(turn: UserTurn) -> bool:
    """Whether the assistant declines, and not for want of something that the user could give."""
    answer = plain(turn.answer)
    if not answer or len(answer) > MAX_REFUSAL_CHARS or any(turn.messages[i].tool_calls for i in turn.steps):
        return False
    return bool(phrases.REFUSES.search(answer)) and not phrases.LACKS_SOMETHING.search(answer)


def weigh(refused: UserTurn, after: list[UserTurn]) -> Evidence:
    """after: the turns up to the first that is no refusal, if there is one."""
    evidence = Evidence()
    helping = after[-1]
    pleas = " ".join(plain(turn.said) for turn in after)
    request = plain(refused.said)
    if (
        not helping.steps
        or is_refusal(helping)
        or phrases.TRICKS.search(pleas)
        or phrases.IS_HARMFUL.search(f"{request} {pleas}")
        or phrases.MOVES_ON.search(plain(helping.said))
    ):
        return evidence
    evidence.add(HELPED_AFTER_ALL, "the assistant declined, and helped when it was asked again")
    if phrases.EXPLAINS.search(pleas):
        evidence.add(EXPLANATION, "the user explained or insisted")
    if overlap(words(refused.said), words(f"{pleas} {helping.answer}")) >= MIN_OVERLAP:
        evidence.add(SAME_MATTER, "it is the same matter")
    if phrases.CONCEDES.search(plain(helping.answer)):
        evidence.add(CONCESSION, "the assistant concedes it")
    return evidence
