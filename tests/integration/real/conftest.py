"""One vLLM server on the real language model for all tests of this folder; each puts back what it taught."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, start_live

from apollo_ipc.demo.real_model import copy_real_model


@pytest.fixture(scope="package")
def live(real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    model_dir = copy_real_model(tmp_path_factory.mktemp("real") / "model")
    with tempfile.TemporaryDirectory(prefix="apollo-t-", dir="/tmp") as base:
        live = start_live(model_dir, Path(base), "--max-model-len", "4096")
        yield live
        live.close()
