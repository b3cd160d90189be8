"""Training by command is watched too; `apollo-ipc quality check`."""

from __future__ import annotations

import json

import pytest
from fake_vllm import FakeVllm
from quality_night import night_in

from apollo_curation.chat_client import ModelAway
from apollo_curation.quality import watch
from apollo_curation.quality.watch import QualityBroken, Watching, watched


@pytest.fixture
def night(tmp_path):
    with night_in(tmp_path) as night:
        yield night


@pytest.fixture
def watching(night, monkeypatch):
    """`watched` of the commands, on the night's server."""
    night.server.close = night.judge.close = lambda: None
    monkeypatch.setattr(watch, "learner", lambda config, stop: night.server)
    monkeypatch.setattr(watch, "judging", lambda config, stop: night.judge)
    return lambda: watched(night.config, night.store, night.server)


def test_training_by_command_is_watched_and_says_what_became_worse(night, watching):
    with watching() as each:
        night.batches.train("bootstrap", night.add("fine"), each=each)
    assert night.labels() == ["before", "after"]
    night.change(on_breach="restore")
    with (
        pytest.raises(QualityBroken, match=r"facts: held-out loss.*weight version 1 is restored as"),
        watching() as each,
    ):
        night.batches.train("bootstrap", night.add("poison"), each=each)
    assert night.server.losses["facts"] == 1.0
    assert night.labels()[2:] == ["before", "after", "restored"]


def test_training_by_command_is_not_begun_where_the_model_is_worse_already(night, watching):
    with watching():
        pass
    night.server.poison()
    with pytest.raises(QualityBroken, match="worse than when it was last good"), watching():
        pytest.fail("it was begun")


def test_without_a_heldout_set_training_by_command_is_not_watched(night, watching):
    night.change(enabled=False)
    with watching() as each:
        night.batches.train("bootstrap", night.add("poison"), each=each)
    assert night.labels() == []


def test_small_jobs_of_a_loop_are_watched_against_one_reference_until_a_window_is_over(night):
    now = 0.0
    night.change(on_breach="restore")
    night.server.effects |= {"creep": night.server.creep, "creep more": night.server.creep}
    watching = Watching(night.config, night.store, night.server, night.judge, night.server, clock=lambda: now)

    def train(kind):
        with watching.turn() as each:
            night.batches.train("bootstrap", night.add(kind), each=each)

    train("fine")
    train("also fine")
    assert night.labels() == ["before", "after", "after"]
    now += night.config.curation.window_s
    train("fine again")
    assert night.labels()[3:] == ["before", "after"]
    # 3 % each, 5 % are allowed: no single job breaks it, both together do.
    watching = Watching(night.config, night.store, night.server, night.judge, night.server, clock=lambda: now)
    train("creep")
    with pytest.raises(QualityBroken, match="is restored as"):
        train("creep more")
    assert night.server.losses["facts"] == 1.0


def test_a_turn_that_was_not_measured_after_is_made_up_for_by_the_next(night):
    watching = Watching(night.config, night.store, night.server, night.judge, night.server)
    night.server.effects["fine"] = lambda: setattr(night.server, "is_away", True)
    with pytest.raises(ModelAway), watching.turn() as each:
        night.batches.train("bootstrap", night.add("fine"), each=each)
    night.server.is_away = False
    with watching.turn():
        pass
    assert night.labels() == ["before", "after", "before", "after"]


@pytest.fixture
def served(monkeypatch):
    """vLLM, without a worker behind it."""
    with FakeVllm() as vllm:
        vllm.content = "Paris"
        monkeypatch.setenv("APOLLO_CURATION__URL", vllm.url)
        monkeypatch.setattr("apollo_curation.cli.quality.WORKER_PATIENCE_S", 0.0)
        yield vllm


def test_the_command_measures_a_server_and_exits_by_what_it_found(apollo, served, night, monkeypatch):
    monkeypatch.setenv("APOLLO_QUALITY__HELDOUT", night.config.quality.heldout)
    monkeypatch.setenv("APOLLO_QUALITY__CANARIES", night.config.quality.canaries)
    monkeypatch.setenv("APOLLO_JUDGE__ENABLED", "false")
    served.logprob = lambda token: -1.0
    told = apollo("quality", "check")
    assert (told.returncode, told.stderr) == (0, "")
    assert "canary kind: not judged: no judge is configured" in told.stdout
    assert "canaries: 1 of 2 pass, 1 not judged" in told.stdout
    assert "within the limits (held against nothing yet)" in told.stdout
    served.logprob = lambda token: -1.2
    told = apollo("quality", "check")
    assert told.returncode == 1
    assert "BREACH chat: held-out loss 1.0000 -> 1.2000 nats a token (+20.0%)" in told.stdout
    shown = json.loads(apollo("quality", "check", "--json").stdout)
    assert shown["ok"] is False
    assert shown["measurement"]["losses"]["facts"]["num_tokens"] == len("facts|")
    assert shown["measurement"]["weight_version"] is None
    assert apollo("quality", "check", "--accept").returncode == 0
    assert apollo("quality", "check").returncode == 0
