"""The front's feeds of curves: training waits for no library, and no library ends it."""

from __future__ import annotations

import os
import sys
import time

import pytest
from fake_worker import short_dir
from test_front import wait_for, worker_in

from apollo_ipc.process.supervise import STOP_VLLM_S


@pytest.mark.parametrize(
    "what", ["import time; time.sleep(1e6)", "raise OSError('no disk')", "import os; os.abort()"]
)
def test_a_library_that_hangs_raises_or_dies_holds_nothing_up(what, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(what)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("FAKE_FRONT_LOG_TO", "wandb")
    with short_dir() as directory, worker_in(directory, step_s=0.01) as worker:
        worker.wait_until_attached()
        jobs = [worker.submit(num=3) for _ in range(3)]
        wait_for(lambda: all(worker.job(job).state in ("applied", "durable") for job in jobs))
        started = time.monotonic()
        worker.process.terminate()
        assert worker.process.wait(STOP_VLLM_S) == 0
        assert time.monotonic() - started < STOP_VLLM_S
