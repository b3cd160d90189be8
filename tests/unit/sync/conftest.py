"""A small model's directory, to be synced into."""

from __future__ import annotations

from pathlib import Path

import pytest
from synced_weights import make_model


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return make_model(tmp_path / "model")
