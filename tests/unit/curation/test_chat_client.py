"""The client of the served model against a small server that answers as vLLM does."""

from __future__ import annotations

import pytest
from fake_vllm import FakeVllm

from apollo_curation import chat_client as served_model
from apollo_curation.chat_client import ChatClient, ModelAway, ServerRefused
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr(served_model, "RETRY_S", 0.01)
    with FakeVllm() as vllm:
        yield vllm


QUESTION = [Message("user", "Q?")]


def test_the_first_model_of_the_list_is_asked_and_weights_of_messages_stay_here(vllm):
    model = ChatClient(f"{vllm.url}/v1/")
    context = [*QUESTION, Message("assistant", "A", weight=0), *QUESTION]
    assert model.chat(context, max_tokens=5).content == "Hello."
    ((path, body),) = vllm.bodies
    assert (path, body["model"]) == ("/v1/chat/completions", "m")
    assert all("weight" not in message for message in body["messages"])
    assert model.num_ended == 1


def test_a_thought_before_the_answer_is_left_out(vllm):
    vllm.content = "Let me see.\n</think>\n\nHello."
    assert ChatClient(vllm.url).chat(QUESTION, max_tokens=5).content == "Hello."


@pytest.mark.parametrize(("finish_reason", "is_cut_off"), [("stop", False), ("length", True)])
def test_an_answer_that_reached_max_tokens_is_told_from_a_whole_one(vllm, finish_reason, is_cut_off):
    vllm.finish_reason = finish_reason
    answer = ChatClient(vllm.url).answer(QUESTION, max_tokens=5)
    assert (answer.message.content, answer.is_cut_off) == ("Hello.", is_cut_off)


def test_only_the_answer_up_to_its_end_of_turn_is_measured(vllm):
    found = ChatClient(vllm.url).answer_logprobs(QUESTION, Message("assistant", "Yes"))
    assert found == [-token / 100 for token in b"Yes|"]  # not the newline behind it


def test_a_turn_without_a_thought_is_measured_where_the_prompt_would_open_one(vllm):
    vllm.thinks = True
    found = ChatClient(vllm.url).answer_logprobs(QUESTION, Message("assistant", "Yes"))
    assert found == [-token / 100 for token in b"Yes|"]


def test_a_server_that_starts_is_waited_for(vllm):
    vllm.faults = [503, 502, 429]
    assert ChatClient(vllm.url, patience_s=10).chat(QUESTION, max_tokens=5).content == "Hello."
    assert len(vllm.bodies) == 4


def test_a_server_that_stays_away_is_given_up(vllm):
    vllm.faults = [503] * 100
    with pytest.raises(ModelAway, match=r"did not answer for 0.05 s.*503: not now"):
        ChatClient(vllm.url, "m", patience_s=0.05).chat(QUESTION, max_tokens=5)
    with pytest.raises(ModelAway, match="ConnectError"):
        ChatClient("http://127.0.0.1:1", "m", patience_s=0).chat(QUESTION, max_tokens=5)
    vllm.faults = [503] * 100
    with pytest.raises(ModelAway):  # at once, though its patience is long
        ChatClient(vllm.url, "m", patience_s=1000, stop=lambda: True).chat(QUESTION, max_tokens=5)


def test_a_refusal_is_not_tried_again_and_says_what_the_server_said(vllm):
    vllm.faults = [400]
    with pytest.raises(ServerRefused) as raised:
        ChatClient(vllm.url, patience_s=10).chat(QUESTION, max_tokens=5)
    error = raised.value
    assert (error.status, error.said, error.field) == (400, "not now", "messages")
    assert f"{vllm.url}/v1/chat/completions answered 400: not now" in error.message
    assert len(vllm.bodies) == 1


def test_the_load_is_that_of_all_engines(vllm):
    load = ChatClient(vllm.url).load()
    assert (load.num_running, load.num_waiting, load.num_ended) == (3, 4, 15)


def test_a_server_without_vllms_metrics_is_named(vllm):
    vllm.metrics = "process_cpu_seconds_total 1.0\n"
    with pytest.raises(UserError, match="is it a vLLM"):
        ChatClient(vllm.url).load()
