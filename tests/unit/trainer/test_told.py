"""What only the trainer sees, and webhooks tell: steps that were cut off and mended, syncs that failed."""

from __future__ import annotations

import json

import msgspec
import pytest
from apollo_worker.trainer.told_syncs import CUT_OFF
from trainer_by_hand import Killed, Trainer, kill_in_backward, with_train

from apollo_ipc.config import Webhooks
from apollo_ipc.errors import CheckpointError
from apollo_ipc.webhooks.outbox import Outbox, outbox_path

URL = "http://hooks.test/in"


@pytest.fixture
def told(config):
    """(the configuration, what its outbox tells)."""
    config = msgspec.structs.replace(config, webhooks=Webhooks(urls=[URL]))

    def read():
        outbox = Outbox(outbox_path(config), [URL])
        try:
            rows = outbox.db.execute("SELECT body FROM events ORDER BY seq").fetchall()
        finally:
            outbox.close()
        return [json.loads(row[0]) for row in rows]

    return config, read


def tear(config) -> str:
    with Trainer(config) as first:
        first.submit("kept")
        first.train()
        first.sync()
        job_id = first.submit("torn", epochs=3)
        kill_in_backward(first, at_step=2)
        with pytest.raises(Killed):
            first.train()
    return job_id


def test_a_mended_step_is_counted_and_told_also_where_the_mending_was_killed(served, told, monkeypatch):
    config, read = told
    job_id = tear(config)
    second = Trainer(config)
    with monkeypatch.context() as patch:
        patch.setattr("apollo_worker.trainer.recovery.copy_shards_into", killed)
        with pytest.raises(Killed):
            second.worker.attachment.ensure()
    second.kill()
    assert read() == []
    with Trainer(config) as third:
        assert third.board.state.tally.num_torn_steps == 1
    (event,) = read()
    assert (event["type"], event["data"]) == (
        "step.mended",
        {"job_id": job_id, "step": 2, "outcome": "restored"},
    )


def test_an_accepted_step_is_told_as_such(served, told):
    config, read = told
    config = with_train(config, on_torn_step="accept")
    tear(config)
    with Trainer(config):
        pass
    assert [event["data"]["outcome"] for event in read()] == ["accepted"]


# --- syncs that fail ---


def failures(events) -> list[tuple[str, int, int]]:
    assert {event["type"] for event in events} <= {"sync.failed"}
    return [
        (event["data"]["error"], event["data"]["weight_version"], event["data"]["durable_version"])
        for event in events
    ]


def fails(*_, **__):
    raise CheckpointError("no space left on device")


def test_a_failed_sync_is_told_once_and_one_that_was_written_not(served, told, monkeypatch):
    config, read = told
    with Trainer(config) as trainer:
        trainer.submit("one")
        trainer.train()
        with monkeypatch.context() as patch:
            patch.setattr(trainer.worker.attachment.writer, "start", fails)
            with pytest.raises(CheckpointError):
                trainer.sync()
        trainer.sync()
    with Trainer(config):
        pass
    assert failures(read()) == [("no space left on device", 1, 0)]


def test_a_trainer_that_is_killed_before_the_outbox_has_its_failed_sync_leaves_it_to_the_next(
    served, told, monkeypatch
):
    config, read = told
    with Trainer(config) as trainer:
        trainer.submit("one")
        trainer.train()
        with monkeypatch.context() as patch:
            patch.setattr(trainer.worker.attachment.writer, "start", killed)
            with pytest.raises(Killed):
                trainer.sync()
        assert read() == []
    for _ in range(2):
        with Trainer(config):
            pass
    assert failures(read()) == [(CUT_OFF, 1, 0)]


def test_a_trainer_that_is_killed_between_the_commit_and_the_outbox_tells_of_no_failure(
    served, told, monkeypatch
):
    config, read = told
    with Trainer(config) as trainer:
        trainer.submit("one")
        trainer.train()
        with monkeypatch.context() as patch:
            patch.setattr("apollo_worker.trainer.sync_policy.note_sync", killed)
            with pytest.raises(Killed):
                trainer.sync()
    with Trainer(config) as trainer:
        assert trainer.board.state.durable_version == 1
        assert read() == []
        trainer.submit("two")
        trainer.train()
        trainer.sync()
    assert read() == []


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_full_disk_that_keeps_the_outbox_from_it_too_only_delays_it(served, told, monkeypatch, is_killed):
    config, read = told
    with Trainer(config) as trainer:
        trainer.submit("one")
        trainer.train()
        with monkeypatch.context() as patch:
            patch.setattr(trainer.worker.attachment.writer, "start", fails)
            patch.setattr(Outbox, "add", fails)
            with pytest.raises(CheckpointError):
                trainer.sync()
        assert read() == []
        if not is_killed:
            trainer.sync()
            assert failures(read()) == [("no space left on device", 1, 0)]
    with Trainer(config):
        pass
    assert failures(read()) == [(CUT_OFF if is_killed else "no space left on device", 1, 0)]


def killed(*_, **__):
    raise Killed
