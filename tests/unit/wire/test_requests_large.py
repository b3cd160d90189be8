"""Large bodies are decoded an example at a time, to the same result and with the same errors."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest

from apollo_ipc.errors import UserError
from apollo_ipc.wire import requests
from apollo_ipc.wire.requests import parse_json, parse_train_body, parse_train_data

IDS = {"context_ids": [1], "continuation_ids": [5] * 1999}


def body_of(num: int, last: dict, **beside) -> bytes:
    return msgspec.json.encode({"examples": [IDS] * num + [last], **beside})


@pytest.mark.parametrize(
    ("last", "beside"),
    [
        (IDS, {}),
        (IDS, {"options": {"lr": 1e-4}}),
        ({"prompt": "a"}, {}),
        ({"promt": "a"}, {}),
        ({"context_ids": ["1"], "continuation_ids": [1]}, {}),
        (IDS, {"options": {"lr": "x"}}),
        (IDS, {"optoins": {}}),
    ],
)
def test_a_large_body_is_taken_or_refused_as_a_small_one_would_be(last, beside):
    def outcome(parse):
        try:
            return parse()
        except UserError as error:
            return error.message, error.field, error.code

    body = body_of(80, last, **beside)
    assert len(body) > requests.PIECEWISE_BYTES
    assert outcome(lambda: parse_train_body(body)) == outcome(lambda: parse_train_data(parse_json(body)))


def test_another_thread_runs_while_31_mb_are_decoded():
    body, gaps, is_done = body_of(7800, IDS), [], threading.Event()
    assert len(body) > 31_000_000

    def tick():
        last = time.perf_counter()
        while not is_done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        assert len(parse_train_body(body).examples) == 7801
    finally:
        is_done.set()
        ticking.join()
    # The Ack of another request must not be late: 0.8 s. Whole, the same body holds the lock for seconds.
    assert max(gaps) < 0.5
