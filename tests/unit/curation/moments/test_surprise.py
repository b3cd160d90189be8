"""Surprise: what is measured, of which moments, and what happens where it cannot be."""

from __future__ import annotations

import pytest
from fake_vllm import FakeVllm

from apollo_curation.chat_client import ChatClient
from apollo_curation.logs.conversation import Origin
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.moments.surprise import score, unscored
from apollo_curation.store import Store
from apollo_ipc.wire.requests import Message


@pytest.fixture
def server():
    with FakeVllm() as server:
        yield server


@pytest.fixture
def model(server):
    model = ChatClient(server.url, patience_s=0.0)
    yield model
    model.close()


@pytest.fixture
def moments(tmp_path):
    with Store(tmp_path / "state" / "curation.sqlite") as store:
        yield Moments(store)


def moment(question="6 x 7?", answer="42", **changes):
    answer = None if answer is None else Message("assistant", answer)
    context = [Message("user", question)]
    values = Moment("correction", "direct", context, answer, Origin("log", 1, 0), "t", "r", 0.5)
    return Moment(**({name: getattr(values, name) for name in values.__struct_fields__} | changes))


def test_surprise_is_the_mean_over_the_answers_tokens_and_its_end_of_turn(moments, model):
    (added,) = moments.add([moment()])
    assert score(moments, model).num_scored == 1
    by_hand = sum(b"42|") / 100 / 3  # without the line's end, which stands behind the end of the turn
    assert moments.get(added.moment_id).surprise == pytest.approx(by_hand)


def test_a_correction_that_has_no_answer_has_no_surprise(moments, model):
    away, other = moments.add(
        [moment(answer=None, original=Message("assistant", "41"), state="approved"), moment(state="approved")]
    )
    assert away.teaches
    assert score(moments, model, moments.list("approved")).num_scored == 1
    assert moments.get(away.moment_id).surprise is None
    assert moments.get(other.moment_id).surprise is not None


def test_only_what_may_be_trained_and_has_no_score_is_scored(moments, model):
    moments.add(
        [
            moment("flagged?"), moment("approved?", state="approved"), moment("no answer?", answer=None),
            moment("scored?", surprise=1.0), moment("rejected?", state="rejected"),
        ]
    )  # fmt: skip
    assert {one.context[0].content for one in unscored(moments)} == {"flagged?", "approved?"}
    assert score(moments, model).num_scored == 2
    assert score(moments, model).num_scored == 0


def test_a_model_that_is_away_leaves_the_rest_for_later(moments, model, server):
    moments.add([moment(f"{i}?") for i in range(3)])
    server.faults = [503] * 100
    counts = score(moments, model)
    assert (counts.num_scored, counts.num_away) == (0, 3)
    assert len(server.bodies) == 1  # not asked once for each
    server.faults = []
    assert score(moments, model).num_scored == 3


def test_what_the_server_cannot_read_is_counted_and_the_rest_is_scored(moments, model, server):
    moments.add([moment("fine?"), moment("unreadable?")])
    server.refuses = "unreadable"
    counts = score(moments, model)
    assert (counts.num_scored, counts.num_refused) == (1, 1)
    assert counts.problem is not None
    assert "as told" in counts.problem


def test_an_answer_that_was_edited_meanwhile_gets_no_score_of_the_old_one(moments, model):
    (added,) = moments.add([moment()])
    moments.change(added.moment_id, answer=Message("assistant", "forty-two"))
    counts = score(moments, model, [added])
    assert (counts.num_scored, counts.num_decided_meanwhile) == (0, 1)
    assert moments.get(added.moment_id).surprise is None
