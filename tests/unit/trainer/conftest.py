"""A small model, and a process that serves it as vLLM does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from served_model import Exporter, make_config

from apollo_ipc.config import Config


@pytest.fixture
def model_dir(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(tmp_path)


@pytest.fixture
def served(model_dir, config):
    with Exporter(model_dir, config.runtime_dir) as exporter:
        yield exporter
