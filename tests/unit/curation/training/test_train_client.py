"""Restore and pin as curation asks for them: over HTTP, with patience."""

from __future__ import annotations

from contextlib import closing

import pytest
from batch_fixtures import config_in

from apollo_curation.chat_client import ModelAway, ServerRefused
from apollo_curation.train_client import TrainClient


@pytest.fixture
def client(server, tmp_path):
    with closing(TrainClient(config_in(tmp_path, server.url))) as client:
        yield client


def test_a_restore_waits_for_the_job_that_trains_and_for_a_server_that_restarts(server, client, parts):
    parts.add("a")
    job_id = client.submit(parts.request(), "key")
    client.job(job_id)
    assert server.jobs[job_id]["info"]["state"] == "running"
    server.faults = [None, 503, "drop"]  # the first answer is 409
    look = server.restore

    def restore(version):
        answer = look(version)
        server.end_all()
        return answer

    server.restore = restore
    result = client.restore(1)
    assert (result.restored_version, result.weight_version, server.restored) == (1, 3, [1])
    assert [path for method, path in server.requests].count("/checkpoint/restore") == 4


def test_a_restore_that_never_comes_to_its_turn_or_is_refused_says_so(server, parts, tmp_path):
    with closing(TrainClient(config_in(tmp_path, server.url, patience_s=0.0))) as client:
        parts.add("a")
        client.job(client.submit(parts.request(), "key"))
        with pytest.raises(ModelAway, match=r"version 1 could not be restored: .*a job is being trained"):
            client.restore(1)
        server.end_all()
        with pytest.raises(ServerRefused, match="version 9 is not kept"):
            client.restore(9)


def test_a_pin_takes_the_place_of_the_one_before(server, client):
    client.pin(1)
    client.pin(2)
    assert server.pinned == 2
