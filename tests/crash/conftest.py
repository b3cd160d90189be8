from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from apollo_ipc.checkpoint import transaction


@pytest.fixture
def work_dir() -> Iterator[Path]:
    """In memory where that is possible: some hundred thousand files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a run leaves in files and names: with the disk's own times (SimulatedDisk) a state is the same
    to the last byte in each run, and is tried once."""
    monkeypatch.setattr(transaction, "time", SimpleNamespace(time=lambda: 1_700_000_000.0))
    monkeypatch.setattr(os, "getpid", lambda: 4711)
