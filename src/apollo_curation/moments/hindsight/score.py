"""Candidates become scored moments: the served model is asked what the user's next message says of the
answer.

The rule, for a moment that rests on what a user said (correction, praise, refusal taken back):

    it can tell, probability below MIN_PROBABILITY -> dropped
    it can tell, probability from there on         -> stays flagged, with the probability
    it cannot tell                                 -> stays flagged, for a judge or a person to approve
    it is away, or cannot score the moment         -> stays a candidate, for a person alone to approve
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from apollo_curation.chat_client import ChatClient, ModelAway, ServerRefused
from apollo_curation.moments.hindsight.calibration import (
    Calibration,
    Calibrations,
    Direction,
    calibrate,
    measure,
    of_direction,
)
from apollo_curation.moments.hindsight.samples import calibrating_samples
from apollo_curation.moments.hindsight.ways import WayName
from apollo_curation.moments.moments import Hindsight, Moment, Moments
from apollo_curation.store import Store
from apollo_ipc.errors import UserError

MIN_PROBABILITY = 0.5


class HindsightCounts(msgspec.Struct):
    """num_scored: candidates that were; of these num_for_it (the next message says what the rule took it to
    say), num_against (dropped), num_untold (the model cannot tell); num_refused: the server cannot score
    them; num_away: left, since it was away."""

    num_scored: int = 0
    num_for_it: int = 0
    num_against: int = 0
    num_untold: int = 0
    num_refused: int = 0
    num_away: int = 0
    num_decided_meanwhile: int = 0
    calibrated: str | None = None  # the model that was calibrated on the way
    problem: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is not nothing, in words."""
        words = {
            "confirmed": self.num_for_it,
            "dropped": self.num_against,
            "the model cannot tell": self.num_untold,
            "refused": self.num_refused,
            "away": self.num_away,
            "calibrated": self.calibrated,
        }
        return {name: value for name, value in words.items() if value}


def direction_of(moment: Moment) -> Direction:
    return "for" if moment.kind == "praise" else "against"


def candidates(moments: Moments) -> list[Moment]:
    """The surest first: phrases say what is scored first."""
    found = [one for one in moments.list("flagged") if one.is_candidate]
    return sorted(found, key=lambda one: (-one.confidence, one.created_at, one.moment_id))


def look_back(
    store: Store,
    model: ChatClient,
    which: Iterable[Moment] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> HindsightCounts:
    """Scores `which` (default: all candidates), each by two forward passes. A model that was never calibrated
    is, before.

    A model that is away costs its patience once: what is left stays a candidate. Raises ServerRefused where
    the server would refuse every request.
    """
    moments, counts = Moments(store), HindsightCounts()
    waiting = list(which) if which is not None else candidates(moments)
    if not waiting:
        return counts
    try:
        calibration = calibrated(store, model, counts)
        for moment in waiting:
            if stop():
                break
            _score(moments, moment, model, calibration, counts)
    except ModelAway as error:
        counts.num_away = len(waiting) - counts.num_scored - counts.num_refused - counts.num_decided_meanwhile
        counts.problem = error.message
    return counts


def calibrated(store: Store, model: ChatClient, counts: HindsightCounts) -> Calibration | None:
    """The model's calibration, made where there is none; None where it cannot be made."""
    table = Calibrations(store)
    known = table.of(model.model)
    if known is not None:
        return known
    try:
        made = calibrate(model, calibrating_samples())
    except (ModelAway, ServerRefused):
        raise
    except UserError as error:  # its template renders no sample, for instance
        counts.problem = error.message
        return None
    table.keep(made)
    counts.calibrated = made.model
    return made


def _score(
    moments: Moments,
    moment: Moment,
    model: ChatClient,
    calibration: Calibration | None,
    counts: HindsightCounts,
) -> None:
    decided = moment.original or moment.answer
    assert decided is not None
    said_next = next((one.content for one in moment.aftermath if one.role == "user"), "")
    direction = direction_of(moment)
    ear = calibration.ear(direction) if calibration else None
    if ear is None or not ear.curve.can_tell:
        why = "it was not calibrated" if ear is None else "by its calibration"
        changes: dict[str, Any] = {
            "hindsight": Hindsight(model.model, sentence=f"{model.model} cannot tell, {why}")
        }
        outcome = "num_untold"
    else:
        try:
            found = measure(model, ear.way, moment.context, decided, said_next, moment.tools)
        except ModelAway:
            raise
        except UserError as error:
            if isinstance(error, ServerRefused) and not error.is_of_this_request:
                raise
            counts.num_refused += 1
            counts.problem = error.message
            return
        nats = of_direction(direction, found)
        # The rule's confidence is what is known before; of a judged moment that has become the judge's.
        prior = 0.5 if moment.num_judged else moment.confidence
        p, low, high = ear.curve.probability(nats, prior)
        sentence = describe(ear.way, direction, nats, p, low, high)
        hindsight = Hindsight(model.model, True, p, low, high, nats, found.num_tokens, sentence)
        changes = {"hindsight": hindsight}
        outcome = "num_for_it"
        if p < MIN_PROBABILITY:
            outcome = "num_against"
            changes |= {"state": "dropped", "decided_by": "hindsight", "decided_reason": sentence}
        elif not moment.num_judged:
            changes["confidence"] = low
    try:
        moments.change(moment.moment_id, expected=["flagged"], **changes)
    except UserError:
        counts.num_decided_meanwhile += 1
        return
    counts.num_scored += 1
    setattr(counts, outcome, getattr(counts, outcome) + 1)


def describe(way: WayName, direction: Direction, nats: float, p: float, low: float, high: float) -> str:
    """In words: "With the next message in view the model finds the answer less likely (...)."."""
    spoke = "against" if direction == "against" else "for"
    if way == "message":
        what = "a complaint about an answer" if direction == "against" else "praise of an answer"
        reads = f"The next message reads {'more' if nats > 0 else 'less'} like {what} than like anything else"
    else:
        is_likelier = (nats > 0) == (direction == "for")
        how = "more" if is_likelier else "less"
        reads = f"With the next message in view the model finds the answer {how} likely"
    return (
        f"{reads} ({abs(nats):.2f} nats a token): it spoke {spoke} the answer with a probability of {p:.0%} "
        f"({low:.0%} to {high:.0%})."
    )
