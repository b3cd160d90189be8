"""What only the trainer sees, and webhooks tell: steps that were cut off and mended."""

from __future__ import annotations

import json

import msgspec
import pytest
from trainer_by_hand import Killed, Trainer, kill_in_backward, with_train

from apollo_ipc.config import Webhooks
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


def killed(*_):
    raise Killed
