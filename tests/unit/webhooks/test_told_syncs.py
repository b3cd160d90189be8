"""Syncs that fail, without a trainer: an outbox that cannot be written for a while loses none of them."""

from __future__ import annotations

import json

import msgspec
import pytest
from apollo_worker.trainer.told_syncs import CUT_OFF, ToldSyncs

from apollo_ipc.config import Config, Paths, Webhooks
from apollo_ipc.webhooks.outbox import Outbox, outbox_path

URL = "http://hooks.test/in"


@pytest.fixture
def config(tmp_path):
    return Config(paths=Paths(state_dir=str(tmp_path)), webhooks=Webhooks(urls=[URL]))


def told(config) -> list[tuple[str, int]]:
    with Outbox(outbox_path(config), [URL]) as outbox:
        rows = outbox.query("SELECT body FROM events ORDER BY seq")
    data = [json.loads(row[0])["data"] for row in rows]
    return [(one["error"], one["weight_version"]) for one in data]


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("is_begun_written", [True, False])
def test_failures_in_a_row_while_the_outbox_cannot_be_written_are_all_told_later(
    config, tmp_path, monkeypatch, is_begun_written
):
    syncs = ToldSyncs(config)
    with monkeypatch.context() as patch:
        for version in (1, 2, 3):
            if version > 1 or not is_begun_written:
                patch.setattr(Outbox, "set_intent", full)
            syncs.begin(tmp_path, version, 0)
            patch.setattr(Outbox, "add", full)
            syncs.end(f"full at {version}")
        assert told(config) == []
    syncs.begin(tmp_path, 4, 0)
    assert told(config) == [("full at 1", 1), ("full at 2", 2), ("full at 3", 3)]
    syncs.end(None)
    ToldSyncs(config)
    assert len(told(config)) == 3


def test_what_is_begun_and_neither_ended_nor_committed_is_told_by_the_next_one(config, tmp_path):
    ToldSyncs(config).begin(tmp_path, 5, 0)
    assert told(config) == []
    for _ in range(2):
        ToldSyncs(config)
    assert told(config) == [(CUT_OFF, 5)]


def test_nothing_is_kept_where_nobody_is_to_be_told(config, tmp_path):
    syncs = ToldSyncs(msgspec.structs.replace(config, webhooks=Webhooks()))
    syncs.begin(tmp_path, 1, 0)
    syncs.end("no")
    assert not outbox_path(config).exists()
