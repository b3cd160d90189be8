"""What hindsight's differences mean for one model: measured once on labelled samples, kept under the model's
name.

    apollo-ipc curate calibrate

All ways of hearing the next message are measured, and for each direction the one that separates best is kept.
A model *can tell* where the lower end of the interval of its AUC is at least fit.MIN_AUC; of one that cannot,
no difference is believed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from apollo_curation.chat_client import ChatClient, ServerRefused
from apollo_curation.moments.hindsight.fit import Curve, fit
from apollo_curation.moments.hindsight.samples import LabelledSample
from apollo_curation.moments.hindsight.ways import WAYS, Spoken, WayName, listen
from apollo_curation.store import Store
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

Direction = Literal["against", "for"]
MIN_SAMPLES = 40  # that the server could score
MIN_OF_A_KIND = 10


class Ear(msgspec.Struct, frozen=True):
    """How one direction is told: by which way, and by what curve over its values."""

    way: WayName
    curve: Curve


class Calibration(msgspec.Struct, frozen=True):
    """auc_of_ways: of each way, of `against` and of `for`; num_refused: samples that the server could not
    score."""

    model: str
    made_at: float
    against: Ear
    praised: Ear
    auc_of_ways: dict[str, tuple[float, float]]
    num_refused: int = 0

    def ear(self, direction: Direction) -> Ear:
        return self.against if direction == "against" else self.praised


def of_direction(direction: Direction, spoken: Spoken) -> float:
    return spoken.against if direction == "against" else spoken.praised


def measure(
    model: ChatClient,
    way: WayName,
    context: list[Message],
    answer: Message,
    said_next: str,
    tools: list[dict[str, Any]] | None = None,
) -> Spoken:
    """Two or three forward passes, no token sampled. Raises as ChatClient.answer_logprobs does."""
    own = None if way == "message" else tools
    return listen(
        way, context, answer, said_next, lambda before, said: model.answer_logprobs(before, said, own)
    )


def calibrate(
    model: ChatClient,
    samples: list[LabelledSample],
    each: Callable[[int, int], None] = lambda done, of: None,
) -> Calibration:
    """Measures `samples`. each: hears how many are done.

    Raises ModelAway; UserError where too few samples could be scored.
    """
    heard: dict[WayName, list[Spoken]] = {way: [] for way in WAYS}
    labels: list[str] = []
    num_refused, problem = 0, ""
    for done, sample in enumerate(samples):
        each(done, len(samples))
        try:
            of = (sample.context, sample.answer, sample.said_next)
            found: dict[WayName, Spoken] = {way: measure(model, way, *of) for way in WAYS}
        except ServerRefused as error:
            if not error.is_of_this_request:
                raise
            num_refused, problem = num_refused + 1, error.message
            continue
        except UserError as error:  # its template cannot render the sample
            num_refused, problem = num_refused + 1, error.message
            continue
        for way, spoken in found.items():
            heard[way].append(spoken)
        labels.append(sample.label)
    few = min(labels.count("against"), labels.count("for"), labels.count("neither"))
    if len(labels) < MIN_SAMPLES or few < MIN_OF_A_KIND:
        raise UserError(
            f"{len(labels)} of {len(samples)} samples could be scored, {MIN_SAMPLES} are needed, "
            f"{MIN_OF_A_KIND} of each label" + (f"; the server said: {problem}" if problem else "")
        )
    against: dict[WayName, Curve] = {way: _curve("against", heard[way], labels) for way in WAYS}
    praised: dict[WayName, Curve] = {way: _curve("for", heard[way], labels) for way in WAYS}
    return Calibration(
        model=model.model,
        made_at=time.time(),
        against=_best(against),
        praised=_best(praised),
        auc_of_ways={way: (against[way].auc, praised[way].auc) for way in WAYS},
        num_refused=num_refused,
    )


def _curve(direction: Direction, heard: list[Spoken], labels: list[str]) -> Curve:
    values = [of_direction(direction, spoken) for spoken in heard]
    return fit(values, [label == direction for label in labels])


def _best(curves: dict[WayName, Curve]) -> Ear:
    way = max(WAYS, key=lambda name: curves[name].auc)
    return Ear(way, curves[way])


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
    lines = [calibration.model]
    for words, ear in (("against", calibration.against), ("for", calibration.praised)):
        curve = ear.curve
        verdict = "can tell" if curve.can_tell else "cannot tell"
        lines.append(
            f"  whether a message spoke {words} the answer: {verdict} (by `{ear.way}` AUC {curve.auc:.2f}, "
            f"95 % {curve.auc_low:.2f} to {curve.auc_high:.2f}, {curve.num_positive} of {curve.num_samples})"
        )
    ways = ", ".join(f"{way} {a:.2f} and {b:.2f}" for way, (a, b) in calibration.auc_of_ways.items())
    return "\n".join([*lines, f"  AUC of all ways, against and for: {ways}"])
