"""A queue in a file of its own."""

from __future__ import annotations

import pytest
from apollo_worker.jobs.queue import JobQueue


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "queue.sqlite"


@pytest.fixture
def queue(path):
    queue = JobQueue(path, max_queued=100)
    yield queue
    queue.close()
