"""What hindsight's differences mean for one model: measured once on labelled samples, kept under the model's
name.

    apollo-ipc curate calibrate

All ways of showing the next message are measured, and the one that separates best is kept. A model *can tell*
where the lower end of the interval of its AUC is at least fit.MIN_AUC; of one that cannot, no difference is
believed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean
from typing import Any, Literal

import msgspec

from apollo_curation.chat_client import ChatClient, ServerRefused
from apollo_curation.moments.hindsight.fit import Curve, fit
from apollo_curation.moments.hindsight.samples import Sample
from apollo_curation.moments.hindsight.ways import WAYS, WayName, shown, unshown
from apollo_curation.store import Store
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

Direction = Literal["against", "for"]
MIN_SAMPLES = 40  # that the server could score
MIN_OF_A_KIND = 10


class Difference(msgspec.Struct, frozen=True):
    """nats: per token of the answer, with the next message shown less without; num_tokens: of the answer."""

    nats: float
    num_tokens: int


class Calibration(msgspec.Struct, frozen=True):
    """way: the one that is used; auc_of_ways: of each way, of `against` and of `for`; num_refused: samples
    that the server could not score."""

    model: str
    made_at: float
    way: WayName
    against: Curve
    praised: Curve
    auc_of_ways: dict[str, tuple[float, float]]
    num_refused: int = 0

    def curve(self, direction: Direction) -> Curve:
        return self.against if direction == "against" else self.praised

    def probability(self, direction: Direction, nats: float) -> tuple[float, float, float]:
        """That the message spoke in this direction, and the 95 % interval."""
        return self.curve(direction).probability(oriented(direction, nats))


def oriented(direction: Direction, nats: float) -> float:
    """Larger where more speaks for the direction."""
    return -nats if direction == "against" else nats


def measure(
    model: ChatClient,
    way: WayName,
    context: list[Message],
    answer: Message,
    said_next: str,
    tools: list[dict[str, Any]] | None = None,
) -> Difference:
    """Two forward passes, no token sampled. Raises as ChatClient.answer_logprobs does."""
    before = model.answer_logprobs(unshown(way, context, answer), answer, tools)
    after = model.answer_logprobs(shown(way, context, answer, said_next), answer, tools)
    return Difference(fmean(after) - fmean(before), len(before))


def _all_ways(model: ChatClient, sample: Sample) -> dict[WayName, float]:
    """As `measure` for each way; what several are compared with is scored once."""
    scored: list[tuple[list[Message], float]] = []

    def nats(context: list[Message]) -> float:
        for known, value in scored:
            if known == context:
                return value
        scored.append((context, fmean(model.answer_logprobs(context, sample.answer))))
        return scored[-1][1]

    context, answer = sample.context, sample.answer
    return {
        way: nats(shown(way, context, answer, sample.said_next)) - nats(unshown(way, context, answer))
        for way in WAYS
    }


def calibrate(
    model: ChatClient,
    samples: list[Sample],
    each: Callable[[int, int], None] = lambda done, of: None,
) -> Calibration:
    """Measures `samples`. each: hears how many are done.

    Raises ModelAway; UserError where too few samples could be scored.
    """
    differences: dict[WayName, list[float]] = {way: [] for way in WAYS}
    labels: list[str] = []
    num_refused, problem = 0, ""
    for done, sample in enumerate(samples):
        each(done, len(samples))
        try:
            found = _all_ways(model, sample)
        except ServerRefused as error:
            if not error.is_of_this_request:
                raise
            num_refused, problem = num_refused + 1, error.message
            continue
        except UserError as error:  # its template cannot render the sample
            num_refused, problem = num_refused + 1, error.message
            continue
        for way, nats in found.items():
            differences[way].append(nats)
        labels.append(sample.label)
    few = min(labels.count("against"), labels.count("for"), labels.count("neither"))
    if len(labels) < MIN_SAMPLES or few < MIN_OF_A_KIND:
        raise UserError(
            f"{len(labels)} of {len(samples)} samples could be scored, {MIN_SAMPLES} are needed, "
            f"{MIN_OF_A_KIND} of each label" + (f"; the server said: {problem}" if problem else "")
        )
    curves = {way: _curves(differences[way], labels) for way in WAYS}
    best = max(WAYS, key=lambda way: curves[way][0].auc + curves[way][1].auc)
    return Calibration(
        model=model.model,
        made_at=time.time(),
        way=best,
        against=curves[best][0],
        praised=curves[best][1],
        auc_of_ways={way: (of[0].auc, of[1].auc) for way, of in curves.items()},
        num_refused=num_refused,
    )


def _curves(differences: list[float], labels: list[str]) -> tuple[Curve, Curve]:
    against = fit([oriented("against", nats) for nats in differences], [one == "against" for one in labels])
    praised = fit([oriented("for", nats) for nats in differences], [one == "for" for one in labels])
    return against, praised


SCHEMA = """
CREATE TABLE IF NOT EXISTS calibrations (
    model TEXT PRIMARY KEY,
    body BLOB NOT NULL
);
"""


class Calibrations:
    """One for each model, by the name under which it is served."""

    def __init__(self, store: Store):
        self._store = store
        store.declare(SCHEMA)

    def keep(self, calibration: Calibration) -> None:
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO calibrations VALUES (?, ?)",
                (calibration.model, msgspec.json.encode(calibration)),
            )

    def of(self, model: str) -> Calibration | None:
        rows = self._store.query("SELECT body FROM calibrations WHERE model = ?", model)
        return msgspec.json.decode(rows[0]["body"], type=Calibration) if rows else None


def describe(calibration: Calibration) -> str:
    """For a person: what it was found to be able to tell."""
    lines = [f"{calibration.model}: the next message is shown in the way `{calibration.way}`"]
    for words, curve in (("against", calibration.against), ("for", calibration.praised)):
        verdict = "can tell" if curve.can_tell else "cannot tell"
        lines.append(
            f"  whether it spoke {words} the answer: {verdict} (AUC {curve.auc:.2f}, 95 % "
            f"{curve.auc_low:.2f} to {curve.auc_high:.2f}, {curve.num_positive} of {curve.num_samples})"
        )
    return "\n".join(lines)
