"""What a user's reaction says about the answer before it: corrections, praise, refusals that were none."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from apollo_curation.moments import phrases
from apollo_curation.moments.phrases import plain
from apollo_curation.moments.signals import correcting, praising, refusing
from apollo_curation.moments.signals.cut import standing_alone
from apollo_curation.moments.signals.evidence import Noticed
from apollo_curation.moments.signals.turns import UserTurn, turns
from apollo_ipc.wire.requests import Message

MAX_CHAIN_DOUBT = 0.5
CHAIN_DOUBT = 0.1  # for each further time that the user was not content


def find_reactions(messages: list[Message]) -> Iterator[Noticed]:
    """A story that goes on (corrected again, refused again, praised at last) is one moment: what was decided
    first, and the answer that nobody objected to any more."""
    all_turns = turns(messages)
    i = 0
    while i + 1 < len(all_turns):
        turn = all_turns[i]
        for find in (_refusal, _correction):
            if found := find(all_turns, i):
                noticed, i = found
                yield noticed
                break
        else:
            if noticed := _praise(turn, all_turns[i + 1]):
                yield noticed
            i += 1


def _correction(all_turns: list[UserTurn], i: int) -> tuple[Noticed, int] | None:
    """The moment, and the turn to look at next."""
    wrong = all_turns[i]
    if wrong.final is None:
        return None
    evidence = correcting.weigh(wrong, all_turns[i + 1])
    if not evidence.is_enough:
        return None
    last = i + 1
    while last + 1 < len(all_turns) and correcting.weigh(all_turns[last], all_turns[last + 1]).is_enough:
        last += 1
    doubt_chain(evidence, last - i - 1, "was corrected again")
    answer = _better(all_turns[last], wrong.answer)
    last = _praised(all_turns, last, evidence)
    return _noticed("correction", wrong.final, all_turns[last].end, answer, evidence), last


def _refusal(all_turns: list[UserTurn], i: int) -> tuple[Noticed, int] | None:
    refused = all_turns[i]
    if refused.final is None or not refusing.is_refusal(refused):
        return None
    last = i + 1
    while last + 1 < len(all_turns) and refusing.is_refusal(all_turns[last]):
        last += 1
    evidence = refusing.weigh(refused, all_turns[i + 1 : last + 1])
    if not evidence.is_enough:
        return None
    doubt_chain(evidence, last - i - 1, "was refused again")
    helping = all_turns[last]
    if helping.steps and helping.messages[helping.steps[0]].weight == 0:
        answer = None
    elif helping.steps and helping.messages[helping.steps[0]].tool_calls:
        answer = msgspec.structs.replace(helping.messages[helping.steps[0]], content="")
    else:
        answer = _better(helping, None)
    last = _praised(all_turns, last, evidence)
    return _noticed("wrong_refusal", refused.final, all_turns[last].end, answer, evidence), last


def _praise(turn: UserTurn, reaction: UserTurn) -> Noticed | None:
    if turn.final is None:
        return None
    evidence = praising.weigh(turn, reaction)
    if not evidence.is_enough:
        return None
    answer = turn.messages[turn.final]
    return _noticed("praise", turn.final, reaction.end, answer, evidence)


def _praised(all_turns: list[UserTurn], last: int, evidence) -> int:
    """The turn that ends the story: the next one too where the user is pleased with the better answer."""
    if last + 1 < len(all_turns) and all_turns[last].final is not None:
        praise = praising.weigh(all_turns[last], all_turns[last + 1])
        if praise.is_enough:
            evidence.add(praising.AFTER_A_REPAIR, "the user was pleased with the better answer")
            return last + 1
    return last


def _better(turn: UserTurn, original: str | None) -> Message | None:
    """The answer in words, as it could have stood in the first place. None where tools were needed for it:
    without their results it would be invented."""
    if turn.final is None or len(turn.steps) > 1 or refusing.is_refusal(turn):
        return None
    if turn.messages[turn.final].weight == 0:  # seen, not to be learned
        return None
    text = standing_alone(turn.answer, original)
    if text is None or text == original or phrases.STANDS.search(plain(text)):
        return None
    return Message("assistant", text)


def doubt_chain(evidence, num_more: int, words: str) -> None:
    if num_more:
        evidence.doubt(min(MAX_CHAIN_DOUBT, CHAIN_DOUBT * num_more), f"the answer {words} {num_more} times")


def _noticed(kind, at: int, end: int, answer: Message | None, evidence) -> Noticed:
    return Noticed(kind, at, end, answer, evidence.reason, evidence.confidence)
