"""What a batch sends, what a server's answer means for its moments, stopping and undoing."""

from __future__ import annotations

import msgspec
import pytest
from batch_fixtures import moment

from apollo_curation.chat_client import ServerRefused
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batches import Batches, NothingToTrain, StopTraining
from apollo_ipc.errors import NotFound, UserError
from apollo_ipc.wire.requests import Message

# --- what is sent ---


def test_a_tier_is_trained_by_its_own_settings(server, parts):
    parts.batches.train("direct", parts.add("a"))
    parts.batches.train("dream", parts.add("b", tier="dream"))
    parts.batches.train("bootstrap", parts.add("c", tier="bootstrap"))
    options = [body["options"] for body in server.bodies]
    assert options == [
        {"lr": 1e-4, "epochs": 4, "schedule": "constant", "on_duplicate": "skip"},
        {"lr": 2e-5, "epochs": 1, "schedule": "auto", "on_duplicate": "skip"},
        {"lr": 1e-5, "epochs": 1, "schedule": "auto", "on_duplicate": "skip"},
    ]
    assert [batch.tier for batch in parts.batches.table.list()] == ["direct", "dream", "bootstrap"]


def test_what_is_trained_is_what_the_store_says_now(server, parts):
    kept, rejected, edited = parts.add("kept", "rejected", "before")
    parts.moments.change(rejected.moment_id, state="rejected")
    parts.moments.change(edited.moment_id, answer=Message("assistant", "after"))
    batch = parts.batches.train("direct", [kept, rejected, edited, kept])
    assert batch.moment_ids == [kept.moment_id, edited.moment_id]
    assert server.trained == {"kept": 1, "after": 1}
    assert parts.states() == {"kept": "trained", "rejected": "rejected", "after": "trained"}


def test_a_batch_has_one_loss_and_what_moves_away_is_sent_as_labelled_bad(server, parts):
    (kept,) = parts.add("kept")
    (away,) = parts.moments.add([moment(None, original=Message("assistant", "wrong"))])
    batch = parts.batches.train("direct", [kept, away])
    assert batch.moment_ids == [kept.moment_id]
    parts.batches.train("direct", [away])
    example = server.bodies[-1]["examples"][0]
    assert (example["label"], example["messages"][-1]["content"]) == (False, "wrong")
    assert [body["options"]["epochs"] for body in server.bodies[-2:]] == [4, 1]
    assert parts.moments.get(away.moment_id).state == "trained"


def test_nothing_approved_is_said_and_sends_nothing(server, parts):
    (rejected,) = parts.add("a", state="rejected")
    (silent,) = parts.moments.add([moment(None)])
    with pytest.raises(NothingToTrain):
        parts.batches.train("direct", [rejected, silent])
    assert (server.requests, parts.batches.table.list()) == ([], [])
    assert parts.moments.get(silent.moment_id).state == "approved"


def test_what_is_trained_is_not_trained_again(server, parts):
    (dream,) = parts.add("a", tier="dream")
    parts.batches.train("dream", [dream])
    with pytest.raises(NothingToTrain):
        parts.batches.train("dream", [dream])
    assert server.trained == {"a": 1}
    assert server.bodies[0]["options"]["on_duplicate"] == "skip"


# --- what the server says ---


def test_a_refused_example_is_dropped_with_the_reason_and_the_rest_is_trained(server, parts):
    server.refuse = "long"
    batch = parts.batches.train("direct", parts.add("a", "long 1", "b", "long 2"))
    assert (batch.state, len(batch.moment_ids), server.trained) == ("trained", 2, {"a": 1, "b": 1})
    assert parts.states() == {"a": "trained", "b": "trained", "long 1": "dropped", "long 2": "dropped"}
    dropped = parts.moments.list("dropped")
    assert {one.decided_reason for one in dropped} == {"not trainable: 2050 tokens; at most 2048 fit"}
    assert parts.batches.table.list() == [batch]


def test_a_batch_of_which_nothing_is_taken_fails(server, parts):
    server.refuse = "a"
    batch = parts.batches.train("direct", parts.add("a1", "a2"))
    assert (batch.state, batch.error) == ("failed", "2050 tokens; at most 2048 fit")
    assert (parts.states(), server.jobs) == ({"a1": "dropped", "a2": "dropped"}, {})


def test_a_request_that_is_refused_as_a_whole_fails_with_what_was_said(server, parts):
    server.faults = [400]
    batch = parts.batches.train("direct", parts.add("a"))
    assert (batch.state, batch.error, parts.states()) == ("failed", "as the test says", {"a": "failed"})
    assert parts.moments.list("failed")[0].decided_reason == "as the test says"


def test_a_key_that_is_known_with_another_request_is_explained(server, parts):
    class Other(TrainClient):
        def submit(self, request, idempotency_key):
            server.submit(idempotency_key, {"examples": [{"messages": [{"content": "another"}]}]})
            return super().submit(request, idempotency_key)

    batches = Batches(parts.store, parts.moments, Other(parts.config), parts.config)
    batch = batches.train("direct", parts.add("a"))
    assert batch.state == "failed"
    assert f"the server knows the key {batch.batch_id} with another request" in (batch.error or "")
    assert parts.states() == {"a": "failed"}
    assert server.trained == {}


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_wrong_key_or_a_server_without_training_costs_no_moment(server, parts, status):
    server.faults = [status]
    with pytest.raises(ServerRefused) as raised:
        parts.batches.train("direct", parts.add("a"))
    assert raised.value.status == status
    assert parts.states() == {"a": "training"}
    assert [batch.state for batch in parts.batches.resume()] == ["trained"]
    assert server.trained == {"a": 1}


def test_a_defect_of_the_server_is_asked_about_three_times(server, parts):
    server.faults = [500, 500]
    assert parts.batches.train("direct", parts.add("a")).state == "trained"
    server.faults = [500, 500, 500]
    batch = parts.batches.train("direct", parts.add("b"))
    assert (batch.state, batch.error) == ("failed", "as the test says")
    assert parts.states() == {"a": "trained", "b": "failed"}


@pytest.mark.parametrize("end", ["failed", "cancelled", "quarantined"])
def test_a_job_that_does_not_train_fails_its_moments_and_says_why(server, parts, end):
    server.job_end = end
    batch = parts.batches.train("direct", parts.add("a", "b"))
    assert batch.state == "failed"
    assert batch.error == f"the job was {end} after 1 of 2 steps: three bad steps in a row"
    assert parts.states() == {"a": "failed", "b": "failed"}
    assert parts.moments.list("failed")[0].decided_reason == batch.error


def test_a_trained_batch_keeps_what_its_job_came_to(parts):
    batch = parts.batches.train("direct", parts.add("a", "b"))
    assert (batch.job.loss_first, batch.job.loss_last, batch.job.weight_version) == (2.0, 1.0, 2)
    assert batch.job.steps_done == len(batch.moment_ids) == 2
    assert batch.ended_at is not None
    assert batch.ended_at >= batch.created_at
    assert parts.batches.table.list() == [batch]
    assert parts.batches.table.list(since=batch.created_at + 1) == []


# --- stopping and undoing ---


def test_stopping_cancels_the_job_and_keeps_the_reason(server, parts):
    def stop(job) -> None:
        raise StopTraining("held-out loss rose by 9 %")

    batch = parts.batches.train("direct", parts.add("a", "b"), stop)
    assert batch.state == "stopped"
    assert batch.error == "stopped after 0 of 2 steps: held-out loss rose by 9 %"
    assert parts.states() == {"a": "failed", "b": "failed"}
    assert (server.trained, server.jobs["job-1"]["info"]["state"]) == ({}, "cancelled")
    assert batch.num_trained == 0


def test_a_stop_after_the_last_step_says_that_it_is_in_the_weights(server, parts):
    def stop(job) -> None:
        if job.state == "applied":
            raise StopTraining("too late")

    batch = parts.batches.train("direct", parts.add("a"), stop)
    assert (batch.state, batch.error) == ("stopped", "too late")
    assert (parts.states(), server.trained) == ({"a": "trained"}, {"a": 1})
    assert batch.num_trained == 1


def test_undoing_marks_what_is_not_in_the_weights_any_more(server, parts):
    server.refuse = "bad"
    batch = parts.batches.train("direct", parts.add("a", "bad", "b"))
    other = parts.batches.train("direct", parts.add("c"))
    parts.batches.undo([batch.batch_id])
    assert parts.states() == {"a": "undone", "b": "undone", "bad": "dropped", "c": "trained"}
    assert [one.state for one in parts.batches.table.list()] == ["undone", "trained"]
    assert other == parts.batches.table.list()[-1]
    with pytest.raises(NothingToTrain):  # never by itself
        parts.batches.train("direct", parts.moments.list("undone"))


def test_an_open_batch_cannot_be_undone_and_an_unknown_one_is_named(server, parts):
    def look(job) -> None:
        with pytest.raises(UserError, match="is still being trained"):
            parts.batches.undo([done.batch_id, parts.batches.table.list()[-1].batch_id])

    done = parts.batches.train("direct", parts.add("a"))
    parts.batches.train("direct", parts.add("b"), look)
    assert parts.states() == {"a": "trained", "b": "trained"}  # all or nothing
    with pytest.raises(NotFound, match="no batch 'batch-x'"):
        parts.batches.undo(["batch-x"])


def test_the_request_is_kept_to_the_byte(parts, server):
    batch = parts.batches.train("direct", parts.add("a", "ü\u2028"))
    assert msgspec.to_builtins(parts.batches.table.request(batch.batch_id)) == server.bodies[0]
