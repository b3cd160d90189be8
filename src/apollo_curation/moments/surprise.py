"""How unlikely the answer of a moment is for the model as it is now, without the stripped instructions.

Nats per token: 0 is what the model would say anyway. A moment below curation.min_surprise has nothing to
teach. The difference to the likelihood with the instructions would tell more, but a moment keeps of them only
their hashes, so it is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from apollo_curation.chat_client import ChatClient, ModelAway, ServerRefused
from apollo_curation.moments.moments import Moment, Moments, without_weight
from apollo_ipc.errors import UserError

SCORED_STATES = ("flagged", "approved")


class ScoreCounts(msgspec.Struct):
    """num_refused: the server or its chat template cannot score them; num_away: left, since it was away."""

    num_scored: int = 0
    num_refused: int = 0
    num_away: int = 0
    num_decided_meanwhile: int = 0
    problem: str | None = None


def score(
    moments: Moments,
    model: ChatClient,
    which: Iterable[Moment] | None = None,
) -> ScoreCounts:
    """Measures `which` (default: see unscored) that have an answer. One after another: each is a forward pass
    of its own."""
    counts = ScoreCounts()
    waiting = [one for one in which if one.answer is not None] if which is not None else unscored(moments)
    for i, moment in enumerate(waiting):
        try:
            value = surprise(moment, model)
        except ModelAway as error:
            counts.num_away += len(waiting) - i
            counts.problem = error.message
            break
        except UserError as error:
            if isinstance(error, ServerRefused) and not error.is_of_this_request:
                raise
            counts.num_refused += 1
            counts.problem = error.message
            continue
        if moments.get(moment.moment_id).answer != moment.answer:
            counts.num_decided_meanwhile += 1
            continue
        try:
            moments.change(moment.moment_id, expected=SCORED_STATES, surprise=value)
        except UserError:
            counts.num_decided_meanwhile += 1
            continue
        counts.num_scored += 1
    return counts


def unscored(moments: Moments) -> list[Moment]:
    """What may be trained and has no score yet."""
    return [one for one in moments.list(*SCORED_STATES) if one.answer and one.surprise is None]


def surprise(moment: Moment, model: ChatClient) -> float:
    """In nats per token, the end of the turn included. Raises as ChatClient.answer_logprobs does."""
    assert moment.answer is not None
    context = [without_weight(message) for message in moment.context]
    logprobs = model.answer_logprobs(context, moment.answer, moment.tools)
    return -sum(logprobs) / len(logprobs)
