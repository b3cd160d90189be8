"""A vLLM server's routes before a worker, each of them real but for model and trainer."""

from __future__ import annotations

import shutil

import openai
import pytest
from router_harness import TRAIN_KEY, FakeWorker, Server, make_config
from ui_world import World
from waiting import wait_for


@pytest.fixture
def config(monkeypatch):
    for name in ("RUNTIME_DIR", "STATE_DIR"):
        monkeypatch.setenv(f"APOLLO_PATHS__{name}", "")
    for name in ("TRAIN_KEY", "MAX_BODY_BYTES", "WAIT_TIMEOUT_S"):
        monkeypatch.setenv(f"APOLLO_HTTP__{name}", "1024")
    monkeypatch.delenv("APOLLO_HTTP__WAIT_TIMEOUT_S")
    config = make_config()
    yield config
    shutil.rmtree(config.runtime_dir.parent)


@pytest.fixture
def server(config):
    with Server() as server:
        yield server


@pytest.fixture
def worker(config, request):
    with FakeWorker(config) as worker:
        # On a busy machine it may be seconds until the two have met.
        if "server" in request.fixturenames:
            http = request.getfixturevalue("server").http
            wait_for(lambda: http.get("/train/status").status_code == 200, 30)
        yield worker


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/train/v1", api_key=TRAIN_KEY, max_retries=2) as client:
        yield client


@pytest.fixture
def world(config, tmp_path):
    with World(config, tmp_path) as world:
        yield world
