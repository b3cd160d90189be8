"""`apollo-ipc curate train`, `run` and `status`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
import typer
from batch_fixtures import add, config_in

from apollo_curation.cli import curate_status, curate_train
from apollo_curation.moments.moments import Moments
from apollo_curation.store import Store, store_path
from apollo_curation.training.batch_table import BatchTable


@pytest.fixture
def curate(server, tmp_path, monkeypatch, capsys):
    """`curate("train", "--json")` -> (exit status, standard output)."""
    app = typer.Typer(pretty_exceptions_enable=False)
    for command in (curate_train.train, curate_train.run, curate_status.status):
        app.command()(command)
    for name in [name for name in os.environ if name.startswith("APOLLO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("APOLLO_PATHS__STATE_DIR", str(tmp_path))
    monkeypatch.setenv("APOLLO_PATHS__RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("APOLLO_HTTP__TRAIN_KEY", "key")
    monkeypatch.setenv("APOLLO_CURATION__URL", server.url)
    monkeypatch.setenv("APOLLO_TIER_DIRECT__WHEN", "continuous")

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            app(list(arguments))
        return int(exit.value.code or 0), capsys.readouterr().out

    return call


def test_train_says_what_it_did_and_status_remembers_it(curate, server, tmp_path):
    config = config_in(tmp_path)
    add(config, "a", "b")
    add(config, "long", tier="bootstrap")
    server.refuse = "long"
    status, said = curate("train", "--tier", "direct")
    assert (status, server.trained) == (0, {"a": 1, "b": 1})
    assert "2 examples, 8 answers held beside, loss 2 -> 1, in weight version 2" in said
    status, said = curate("train", "--json")
    assert status == 1  # a batch failed
    found = json.loads(said)
    assert [one["state"] for one in found["batches"]] == ["failed"]
    assert [one["tier"] for one in found["tiers"]] == ["direct", "dream", "bootstrap"]
    found = json.loads(curate("status", "--json")[1])["batches"]
    assert [one["state"] for one in found] == ["failed", "trained"]
    one, *its_moments = json.loads(curate("status", found[1]["batch_id"], "--json")[1])
    assert one == found[1]
    assert [moment["moment_id"] for moment in its_moments] == one["moment_ids"]
    _, said = curate("status")
    assert "2050 tokens" in said
    assert "moments: 1 dropped, 2 trained" in said
    assert "window: 2 of 200 examples in 24 h" in said
    assert json.loads(curate("status", "--json")[1])["window"]["num_trained"] == 2


def test_a_dry_run_says_what_would_be_trained_and_why_not_and_does_nothing(curate, server, tmp_path):
    add(config_in(tmp_path), *(f"answer {word}" for word in ("red", "green", "blue")))
    status, said = curate("train", "--dry-run", "--tier", "direct", "--limit", "2")
    assert status == 0
    assert "direct: 2 would be trained" in said
    assert "direct: 1 left, job full" in said
    assert "answer red" in said
    found = json.loads(curate("train", "--dry-run", "--json", "--limit", "2")[1])
    assert [len(one["chosen"]) for one in found["tiers"]] == [2, 0, 0]
    assert server.requests == []
    with Store(store_path(config_in(tmp_path))) as store:
        assert (BatchTable(store).list(), Moments(store).counts()) == ([], {"approved": 3})


def test_nothing_at_all_is_said_too(curate):
    assert curate("status")[1].startswith("moments: none yet\n")
    assert curate("status")[1].endswith("no batches yet\n")
    assert curate("train") == (
        0,
        "direct: nothing is approved\ndream: nothing is approved\nbootstrap: nothing is approved\n",
    )


def test_sigterm_ends_the_loop_of_the_command_and_puts_the_handlers_back(curate, server, tmp_path):
    add(config_in(tmp_path), "a")
    before = signal.getsignal(signal.SIGTERM)

    def end() -> None:
        deadline = time.monotonic() + 10
        while not server.trained and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=end)
    killer.start()
    status, said = curate("run", "--json")
    killer.join(10)
    assert status == 0
    assert json.loads(said.splitlines()[0])["state"] == "trained"
    assert signal.getsignal(signal.SIGTERM) is before
