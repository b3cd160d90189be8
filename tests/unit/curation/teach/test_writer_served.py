"""The server as a writer: guided by a schema, unreadable, slow, away."""

from __future__ import annotations

import json

import httpx
import pytest
from fake_vllm import FakeVllm

from apollo_curation.chat_client import ChatClient, ModelAway, ServerRefused
from apollo_curation.teach.served import ServedLearner
from apollo_curation.teach.writer import Drafts

GOOD = json.dumps({name: ["One?"] for name in Drafts.__struct_fields__})


@pytest.mark.parametrize(
    ("content", "faults", "num_requests", "is_read"),
    [
        (GOOD, [], 1, True),
        (f"```json\n{GOOD}\n```", [], 1, True),
        ("I would rather not.", [], 2, False),
        (GOOD[:40], [], 2, False),
        ('{"x": ' + "[" * 100_000, [], 2, False),
        ("[]", [], 2, False),
        ('{"questions": 3}', [], 2, False),
        (GOOD, [400], 1, False),  # no guided decoding, or too long for it
    ],
)
def test_the_served_model_is_guided_by_a_schema_and_what_cannot_be_read_is_no_form(
    content, faults, num_requests, is_read
):
    with FakeVllm() as vllm:
        vllm.content, vllm.faults = content, faults
        (found,) = ServedLearner(ChatClient(vllm.url, "m")).write(["Write."], Drafts, max_tokens=9)
    assert (found is not None) == is_read
    assert len(vllm.bodies) == num_requests
    body = vllm.bodies[0][1]
    assert body["max_tokens"] == 9
    schema = body["response_format"]["json_schema"]["schema"]
    assert set(schema["required"]) == set(Drafts.__struct_fields__)


def test_a_server_too_slow_to_write_has_written_nothing(monkeypatch):
    with FakeVllm() as vllm:
        monkeypatch.setattr(httpx.Client, "request", slow)
        chat = ChatClient(vllm.url, "m", patience_s=0)
        assert ServedLearner(chat).write(["Write."], Drafts, max_tokens=9) == [None]
        monkeypatch.setattr(httpx.Client, "request", away)
        with pytest.raises(ModelAway):
            ServedLearner(chat).write(["Write."], Drafts, max_tokens=9)


def slow(*_args, **_options):
    raise httpx.ReadTimeout("timed out")


def away(*_args, **_options):
    raise httpx.ConnectError("refused")


def test_a_server_that_refuses_everything_is_said():
    with FakeVllm() as vllm:
        vllm.faults = [401]
        with pytest.raises(ServerRefused):
            ServedLearner(ChatClient(vllm.url, "m")).write(["Write."], Drafts, max_tokens=9)
