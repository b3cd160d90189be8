"""A better answer is scored as the wrong one was, before it is trained: with the next message in view it must
gain more, or lose less, than the answer that the message spoke against.

Only where the model can tell by the answers' likelihoods (the way `question`): the message's own says nothing
of an answer that came later. What does not gain is set aside: its correction moves away from the wrong answer
alone.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from apollo_curation.chat_client import ChatClient, ModelAway, ServerRefused
from apollo_curation.moments.hindsight.calibration import Calibrations, measure
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.store import Store
from apollo_ipc.errors import UserError


class BetterCounts(msgspec.Struct):
    """num_set_aside: of num_checked; num_away: not checked, since the model was away."""

    num_checked: int = 0
    num_set_aside: int = 0
    num_away: int = 0


def check_better(store: Store, model: ChatClient, stop: Callable[[], bool] = lambda: False) -> BetterCounts:
    """Of all flagged moments whose better answer was not checked yet. Raises ServerRefused where the server
    would refuse every request."""
    moments, counts = Moments(store), BetterCounts()
    waiting = [one for one in moments.list("flagged") if _is_due(one)]
    try:
        calibration = Calibrations(store).of(model.model) if waiting else None
        if calibration is None or calibration.against.way != "question":
            return counts
        for moment in waiting:
            if stop():
                break
            _check(moments, moment, model, counts)
    except ModelAway:
        counts.num_away = len(waiting) - counts.num_checked
    return counts


def _is_due(moment: Moment) -> bool:
    told = moment.hindsight
    return (
        moment.kind in ("correction", "wrong_refusal")
        and told is not None
        and told.can_tell
        and told.better_nats is None
        and moment.answer is not None
        and not moment.answer.tool_calls
    )


def _check(moments: Moments, moment: Moment, model: ChatClient, counts: BetterCounts) -> None:
    told = moment.hindsight
    assert told is not None
    assert told.nats is not None
    assert moment.answer is not None
    said_next = next((one.content for one in moment.aftermath if one.role == "user"), "")
    try:
        found = measure(model, "question", moment.context, moment.answer, said_next, moment.tools)
    except ModelAway:
        raise
    except UserError as error:
        if isinstance(error, ServerRefused) and not error.is_of_this_request:
            raise
        return  # surprise.score names it
    changes: dict[str, object] = {"hindsight": msgspec.structs.replace(told, better_nats=found.against)}
    if found.against >= told.nats:
        why = (
            f"the next message spoke no less against the better answer ({found.against:+.2f} nats a token) "
            f"than against the first ({told.nats:+.2f}), so it is set aside"
        )
        reason = "; ".join(part for part in (moment.decided_reason, why) if part)
        changes |= {"answer": None, "surprise": None, "decided_reason": reason}
    try:
        moments.change(moment.moment_id, expected=["flagged"], **changes)
    except UserError:
        return  # decided meanwhile
    counts.num_checked += 1
    counts.num_set_aside += found.against >= told.nats
