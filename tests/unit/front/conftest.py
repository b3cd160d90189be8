"""The worker's ZMQ end in this process, and a client of it that sends what it likes."""

from __future__ import annotations

import pytest
from fake_worker import serving, short_dir
from raw_peer import Peer


@pytest.fixture
def directory():
    with short_dir() as directory:
        yield directory


@pytest.fixture
def served(directory):
    with serving(directory) as parts:
        yield parts


@pytest.fixture
def peer(served, directory):
    with Peer(directory) as peer:
        yield peer
