"""The real language model, for any test: skipped where its package is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_ipc.demo.real_model import NoRealModel, real_model


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """To be read; `copy_real_model(directory)` makes one that may be trained."""
    try:
        return real_model()
    except NoRealModel as error:
        pytest.skip(error.message)
