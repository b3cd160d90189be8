"""The request of a batch, and what the server's answer to it means."""

from __future__ import annotations

import re
import time
from typing import Literal

import msgspec

from apollo_curation.chat_client import Refused
from apollo_curation.settings import CurationConfig, TierName
from apollo_curation.train_client import Training
from apollo_ipc.wire.requests import Example, TrainOptions, TrainRequest

OnDuplicate = Literal["skip", "train"]
MAX_ATTEMPTS = 3  # at what the server answers with a defect of its own, or forgets
RETRY_S = 2.0

_EXAMPLE = re.compile(r"examples\[(\d+)\]")
# No fault of the request: our key, a server without /train, a body that got stuck on its way.
_NOT_OF_REQUEST = (401, 403, 404, 405, 408)


class Accepted(msgspec.Struct, frozen=True):
    job_id: str


class ExampleRefused(msgspec.Struct, frozen=True):
    """Without example number `at` (from 0) the rest may be taken."""

    at: int
    said: str


class RequestRefused(msgspec.Struct, frozen=True):
    said: str


def submit(training: Training, request: TrainRequest, key: str) -> Accepted | ExampleRefused | RequestRefused:
    """Sends it until there is an answer. The same key and request give the same job, trained once.

    Raises ModelAway, and Refused where the answer is not about this request (key, no /train).
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return Accepted(training.submit(request, key))
        except Refused as error:
            if error.status in _NOT_OF_REQUEST:
                raise
            found = _EXAMPLE.match(error.field or "") if error.status == 400 else None
            if found and int(found[1]) < len(request.examples):
                return ExampleRefused(int(found[1]), error.said)
            if error.code == "conflict":
                return RequestRefused(
                    f"the server knows the key {key} with another request, and may have trained that: see "
                    f"`apollo-ipc jobs --json` before you approve these again. It said: {error.said}"
                )
            if error.status < 500 or attempt == MAX_ATTEMPTS:
                return RequestRefused(error.said)
            time.sleep(RETRY_S)  # a defect may be a passing one
    raise AssertionError("the last attempt returns")


def request_for(
    config: CurationConfig, tier: TierName, examples: list[Example], on_duplicate: OnDuplicate
) -> TrainRequest:
    own = config.tier(tier)
    options = TrainOptions(
        lr=own.lr,
        epochs=own.epochs,
        schedule=own.schedule,
        accumulate_steps=own.accumulate_steps,
        on_duplicate=on_duplicate,
    )
    return TrainRequest(examples, options)
