"""The command that dreams: what it shows, how it ends, whom it asks."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import typer
from dream_world import LESSON, dream_world
from training_server import TrainingServer
from typer.testing import CliRunner

from apollo_curation.cli import curate_status, curate_train
from apollo_curation.dreams import bridge as dream_bridge
from apollo_ipc.errors import NotFound, UserError


def invoke(*arguments, stdin=None):
    """The commands as `apollo-ipc curate` has them."""
    app = typer.Typer()
    for command in (curate_train.dream, curate_status.status):
        app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def curate(monkeypatch):
    """The commands, on a world."""

    def run(world, *arguments, stdin=None):
        @contextmanager
        def opened(config, stop=None, doing=None):
            world.bridge.config = config
            yield world.bridge

        monkeypatch.setattr(curate_train, "open_dreaming", opened)
        return invoke(*arguments, stdin=stdin)

    return run


def test_the_command_dreams_and_lists_what_was_dreamt(environment, config, curate, tmp_path):
    (tmp_path / "lessons.jsonl").write_bytes(b'{"lesson": "Look it up.", "topic": "habits"}\n\xff\n')
    with dream_world(config, needs=1) as world:
        done = curate(world, "dream", "--seeds", tmp_path / "lessons.jsonl", "--json")
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert (told["seeds"][0]["state"], told["num_trained"]) == ("held", 4)
        assert [one["reason"] for one in told["broken"]] == ["not_utf8"]
        seed = told["seeds"][0]["seed_id"]
        listed = json.loads(curate(world, "status", seed, "--json").stdout)
        assert [one["state"] for one in listed] == ["trained"] * 4
        assert listed[-1]["lineage"] == [seed, *(one["dream_id"] for one in listed)]
        assert listed[0]["batch_id"] in curate(world, "status", listed[0]["dream_id"][:6]).stdout
        assert isinstance(curate(world, "status", "d-none").exception, NotFound)
        assert "seeds: 1 held" in curate(world, "status").stdout
        shown = curate(world, "dream", "--seeds", tmp_path / "lessons.jsonl").stdout
        assert "1 seeds held or given up before, 1 broken" in shown
        assert isinstance(curate(world, "dream").exception, UserError)


def test_the_command_says_by_its_status_that_something_was_away_or_failed(
    environment, config, curate, tmp_path
):
    (tmp_path / "lessons.txt").write_text(LESSON)
    with dream_world(config, needs=1) as world:
        world.training.end = "failed"
        assert curate(world, "dream", "--seeds", tmp_path / "lessons.txt").exit_code == 1
        world.script.situation = lambda body: 503
        assert curate(world, "dream", "--seeds", tmp_path / "lessons.txt").exit_code == 69


def test_the_commands_find_model_judge_and_trainer_by_the_configuration(
    environment, config, monkeypatch, tmp_path
):
    (tmp_path / "lessons.txt").write_text(LESSON)
    with TrainingServer() as server, dream_world(config) as world:
        settings = {"CURATION__URL": server.url, "JUDGE__URL": world.server.url, "HTTP__TRAIN_KEY": "key"}
        for name, value in settings.items():
            monkeypatch.setenv(f"APOLLO_{name}", value)
        # The training server has no chat: the judge's server answers for the learner.
        monkeypatch.setattr(dream_bridge, "learner", dream_bridge.judging)
        done = invoke("dream", "--seeds", tmp_path / "lessons.txt", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["num_trained"] == len(server.trained) == 3
        assert {body["options"]["lr"] for body in server.bodies} == {config.tier_dream.lr}
