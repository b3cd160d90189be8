"""A training server that is asked without pauses."""

from __future__ import annotations

import pytest
from batch_fixtures import config_in
from batch_parts import opened
from training_server import TrainingServer

from apollo_ipc.curation import lock, schedule, served_model, submission, training


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    for module, name in (
        (training, "POLL_S"),
        (served_model, "RETRY_S"),
        (submission, "RETRY_S"),
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
