"""A training server that is asked without pauses."""

from __future__ import annotations

import pytest
from batch_fixtures import config_in
from batch_parts import opened
from training_server import TrainingServer

from apollo_curation import chat_client as served_model
from apollo_curation import lock
from apollo_curation import train_client as training
from apollo_curation.training import batches, schedule


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    for module, name in (
        (training, "POLL_S"),
        (served_model, "RETRY_S"),
        (batches, "RETRY_S"),
        (schedule, "POLL_S"),
        (lock, "POLL_S"),
    ):
        monkeypatch.setattr(module, name, 0.005)


@pytest.fixture
def server():
    with TrainingServer() as server:
        yield server


@pytest.fixture
def parts(server, tmp_path):
    with opened(config_in(tmp_path, server.url)) as parts:
        yield parts
