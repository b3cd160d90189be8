"""What is held beside a batch: which answers, where they stand, and when a batch waits for them."""

from __future__ import annotations

import json

import msgspec
import pytest
from batch_fixtures import config_in, holding, moment
from batch_parts import opened
from training_server import content_of, is_held

from apollo_curation.chat_client import ModelAway, ServerRefused
from apollo_curation.settings import Quality
from apollo_curation.teach.job import held_prompts, kept_out_prompts
from apollo_curation.train_client import TrainClient
from apollo_curation.training.replay import held_request, num_held
from apollo_ipc.errors import NotReady
from apollo_ipc.wire.requests import Example, Message


@pytest.fixture
def config(server, tmp_path):
    return holding(config_in(tmp_path, server.url), 1, examples_per_update=2)


@pytest.fixture
def parts(config):
    with opened(config) as parts:
        yield parts


def with_heldout(config, tmp_path, *examples):
    file = tmp_path / "heldout.jsonl"
    file.write_text("".join(json.dumps({"category": "own", **one}) + "\n" for one in examples))
    return msgspec.structs.replace(config, quality=Quality(heldout=str(file)))


def chat(question, answer="as it is"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def updates(body):
    size = body["options"]["accumulate_steps"]
    return [body["examples"][at : at + size] for at in range(0, len(body["examples"]), size)]


def test_each_update_of_a_batch_has_an_answer_of_the_models_own_beside(server, parts):
    batch = parts.batches.train("direct", parts.add("a", "b", "c", "d"))
    (body,) = server.bodies
    assert body["options"] == {
        "lr": 1e-4, "epochs": 1, "schedule": "constant", "on_duplicate": "skip", "accumulate_steps": 3,
    }  # fmt: skip
    assert [[is_held(one) for one in update] for update in updates(body)] == [[False, False, True]] * 8
    learned = [content_of(one) for one in body["examples"] if not is_held(one)]
    for start in range(0, 16, 4):  # a pass
        assert sorted(learned[start : start + 4]) == ["a", "b", "c", "d"]
    held = [one for one in body["examples"] if is_held(one)]
    assert held[0]["continuation_ids"] == [7, 2]
    assert held[0]["top_logprobs"] == [[[7, -0.1], [9, -2.5]], [[2, -0.1], [9, -2.5]]]
    assert "weights" not in held[0]
    assert len({content_of(one) for one in held}) == 8  # none twice while there are others
    assert (batch.num_held, batch.num_trained, server.trained) == (8, 4, dict.fromkeys("abcd", 1))


def test_what_a_moment_answers_is_not_held_and_what_lessons_are_examined_by_never_is(
    server, parts, monkeypatch
):
    assert not set(held_prompts()) & set(kept_out_prompts())
    prompts = held_prompts()[:9]
    monkeypatch.setattr("apollo_curation.training.replay.held_prompts", lambda: prompts)
    moments = [moment("no", context=[Message("user", f" {prompts[0].upper()} ")]), moment("b")]
    with opened(holding(parts.config, 64)) as many:
        batch = many.batches.train("bootstrap", many.moments.add(moments))
    assert sorted(server.asked) == sorted(prompts[1:])
    assert (batch.num_held, server.held) == (8, 64)  # they return where there are not enough


def test_half_of_it_are_the_held_out_sets_prompts_in_any_form(server, config, tmp_path):
    long = chat("long " * 300)
    config = with_heldout(
        config, tmp_path, chat("held?"), {"prompt": "Once ", "completion": "upon"}, long,
        {"context_ids": [65, 66], "continuation_ids": [67]}, chat("Question before a?"),
    )  # fmt: skip
    with opened(config) as parts:
        batch = parts.batches.train("direct", parts.add("a", "b", "c", "d"))
    beside = {content_of(one) for one in server.bodies[0]["examples"] if is_held(one)}
    assert batch.num_held == len(beside) == 8
    # Neither the one that is too long nor the one that a moment answers; the answers in the file are nowhere.
    assert beside - set(held_prompts()) == {"held?", "Once ", "AB"}
    assert "as it is" not in json.dumps(server.bodies)


def test_a_held_out_set_alone_fills_what_the_list_cannot(server, config, tmp_path, monkeypatch):
    monkeypatch.setattr("apollo_curation.training.replay.held_prompts", lambda: ["one?"])
    with opened(with_heldout(config, tmp_path, *(chat(f"held {i}?") for i in range(9)))) as parts:
        parts.batches.train("direct", parts.add("a", "b", "c", "d"))
    assert len(server.asked) == 8
    assert "one?" in server.asked


def test_without_hold_a_batch_is_what_it_was_and_nothing_is_asked(server, tmp_path):
    with opened(config_in(tmp_path, server.url)) as parts:
        batch = parts.batches.train("direct", parts.add("a", "b"))
    assert (server.asked, batch.num_held, server.bodies[0]["options"]["epochs"]) == ([], 0, 4)


def test_what_moves_away_has_nothing_beside_since_a_job_has_one_loss(server, parts):
    (away,) = parts.moments.add([moment(None, original=Message("assistant", "wrong"))])
    batch = parts.batches.train("direct", [away])
    assert (batch.state, batch.num_held, server.asked) == ("trained", 0, [])
    assert "accumulate_steps" not in server.bodies[0]["options"]


# --- when there is nothing to hold ---


def test_a_model_that_says_nothing_has_nothing_trained_into_it(server, parts):
    server.says = []
    with pytest.raises(NotReady, match="says nothing to any prompt"):
        parts.batches.train("direct", parts.add("a"))
    assert (parts.states(), parts.batches.table.list(), server.bodies) == ({"a": "approved"}, [], [])
    server.says = [7]
    assert parts.batches.train("direct", parts.moments.list("approved")).num_held == 2


def test_a_model_that_is_away_is_waited_for_with_the_moments_as_they_were(server, config):
    server.ask_status = 503
    patience = msgspec.structs.replace(config.curation, patience_s=0.02)
    with opened(msgspec.structs.replace(config, curation=patience)) as parts:
        with pytest.raises(ModelAway):
            parts.batches.train("direct", parts.add("a"))
        assert (parts.states(), parts.batches.table.list()) == ({"a": "approved"}, [])
        server.ask_status = None
        assert parts.batches.train("direct", parts.moments.list("approved")).state == "trained"
    assert server.trained == {"a": 1}


def test_a_server_that_refuses_to_be_asked_is_quoted(server, parts):
    server.ask_status = 400
    with pytest.raises(ServerRefused, match="as the test says"):
        parts.batches.train("direct", parts.add("a"))
    assert parts.states() == {"a": "approved"}


def test_a_batch_is_not_sealed_over_moments_that_changed_meanwhile(server, parts, monkeypatch):
    """One that moved away when the model was to be asked, and got an answer before the batch was written."""
    (away,) = parts.moments.add([moment(None, original=Message("assistant", "wrong"))])
    ask = parts.batches._ask

    def edit(*arguments):
        held = ask(*arguments)
        parts.moments.change(away.moment_id, answer=Message("assistant", "right"))
        return held

    monkeypatch.setattr(parts.batches, "_ask", edit)
    with pytest.raises(NotReady, match="try again"):
        parts.batches.train("direct", [away])
    assert parts.states() == {"right": "approved"}
    monkeypatch.undo()
    assert parts.batches.train("direct", [away]).num_held == 2


# --- what the server says ---


def test_a_refused_moment_is_dropped_and_what_is_held_is_not_asked_again(server, parts):
    server.refuse = "long"
    batch = parts.batches.train("direct", parts.add("a", "long 1", "b", "long 2"))
    assert parts.states() == {"a": "trained", "b": "trained", "long 1": "dropped", "long 2": "dropped"}
    assert len(server.asked) == 8
    assert {content_of(one) for one in server.bodies[0]["examples"] if is_held(one)} <= set(server.asked)
    assert parts.batches.table.list() == [batch]
    assert batch.num_held == 4


def test_a_refused_answer_is_left_out_and_no_moment_is_blamed(server, config, tmp_path):
    server.refuse_held = "held"
    with opened(with_heldout(config, tmp_path, chat("held?"))) as parts:
        batch = parts.batches.train("direct", parts.add("a", "b"))
        assert (batch.state, parts.states()) == ("trained", {"a": "trained", "b": "trained"})
    assert batch.num_held == 3
    assert not any(content_of(one) == "held?" for one in server.bodies[0]["examples"])


def test_where_no_answer_can_be_held_the_batch_fails_rather_than_be_trained_without(server, parts):
    server.refuse_held = ""
    batch = parts.batches.train("direct", parts.add("a"))
    assert batch.state == "failed"
    assert (batch.error or "").startswith("none of the answers to be held was taken: 2050 tokens")
    assert (server.trained, parts.states()) == ({}, {"a": "failed"})


def test_a_batch_that_was_left_open_is_sent_as_it_was_whatever_is_configured_now(server, config, tmp_path):
    class Broken(TrainClient):
        def submit(self, request, idempotency_key):
            raise ModelAway("not there")

    with opened(config) as parts:
        parts.batches._training = Broken(config)
        with pytest.raises(ModelAway):
            parts.batches.train("direct", parts.add("a", "b"))
    asked = list(server.asked)
    with opened(holding(config, 0)) as parts:
        (batch,) = parts.batches.resume()
    assert (batch.num_held, server.held, server.asked) == (4, 4, asked)
    assert server.trained == {"a": 1, "b": 1}


def test_an_example_that_is_refused_of_a_batch_from_before_answers_were_held_is_dropped(server, config):
    server.go_down()
    own = msgspec.structs.replace(config.curation, patience_s=0.02)
    config = msgspec.structs.replace(config, curation=own)
    with opened(holding(config, 0)) as parts, pytest.raises(ModelAway):
        parts.batches.train("direct", parts.add("a", "long"))
    server.come_up()
    server.refuse = "long"
    with opened(config) as parts:
        (batch,) = parts.batches.resume()
        assert parts.states() == {"a": "trained", "long": "dropped"}
    assert (batch.num_held, server.asked) == (0, [])


def test_a_job_without_room_for_its_gradients_says_which_setting_helps(server, parts, monkeypatch):
    def end(job_id):
        server.jobs[job_id]["info"].update(
            state="failed", error="an update of 2 passes keeps all gradients (options.accumulate_steps)"
        )

    monkeypatch.setattr(server, "_end", end)
    batch = parts.batches.train("dream", parts.add("a", tier="dream"))
    assert (batch.error or "").endswith(
        "hold = 0 in [tier_dream] trains one example an update and holds nothing"
    )


def test_moments_that_the_worker_had_trained_count_once_however_often_they_stand_in_the_job(parts):
    batch = parts.batches.train("direct", parts.add("a", "b", "c"))
    assert batch.num_passes == 4
    job = msgspec.structs.replace(batch.job, num_skipped=8)
    assert (batch.num_known, msgspec.structs.replace(batch, job=job).num_trained) == (0, 1)


def test_the_number_of_answers_follows_the_number_of_updates(config):
    tier = config.tier_direct
    assert [num_held(num, tier) for num in (1, 2, 3, 16)] == [2, 4, 6, 32]
    examples = [Example(prompt=str(i), completion="x") for i in range(3)]
    request = held_request(examples, [], tier, 0)
    assert len(request.examples) == 12
