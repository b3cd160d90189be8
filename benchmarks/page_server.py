"""For page.py: a real vLLM with our routes, and a stand-in for the worker that is as busy as it is told.

The stand-in is tests/support/fake_worker.py: the real socket, queue and messages, and a trainer that only
counts steps; its queue holds as many jobs as are asked for, and the one before them never ends.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_ipc.config import load_config
from apollo_ipc.keys import train_key
from apollo_ipc.process.serving import VllmServer
from apollo_ipc.wire.requests import Example, TrainRequest

SUPPORT = Path(__file__).resolve().parent.parent / "tests/support"
STEP_S = 0.0025  # with the commit of a step and its news: some 200 events a second where a core is free


@contextmanager
def busy_server(model_dir: Path, num_jobs: int) -> Iterator[tuple[str, str]]:
    """(URL, train key)."""
    sys.path.append(str(SUPPORT))
    from apollo_worker.jobs.queue import JobQueue
    from planned import submit

    with tempfile.TemporaryDirectory(prefix="apollo-page-", dir="/tmp") as base:
        server = VllmServer(model_dir, Path(base), ["--enforce-eager"])
        runtime = server.runtime_dir
        runtime.mkdir(mode=0o700)
        queue = JobQueue(runtime / "queue.sqlite", num_jobs + 10)
        submit(queue, TrainRequest([Example(prompt="a", completion="b")]), num_steps=1_000_000)
        with queue.changing() as db:
            db.executemany(
                "INSERT INTO jobs (job_id, state, created_at, num_examples, num_steps, num_skipped, "
                "request_digest, notes) VALUES (?, 'queued', unixepoch(), 1, 40, 0, x'00', '[]')",
                ((f"job-{i:012x}-00000000",) for i in range(num_jobs)),
            )
        queue.close()
        command = [sys.executable, str(SUPPORT / "fake_worker.py"), str(runtime), str(STEP_S)]
        with server:
            worker = subprocess.Popen(command, stdout=subprocess.PIPE)
            try:
                assert worker.stdout is not None
                assert worker.stdout.readline() == b"ready\n"
                yield server.url, train_key(load_config(environ=server.env))
            finally:
                worker.kill()
                worker.wait()
