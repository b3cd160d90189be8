"""A worker without a model, for tests: the real queue and service, and a trainer that only counts steps.

    python fake_worker.py DIRECTORY [SECONDS_PER_STEP]

prints `ready` once it serves DIRECTORY/worker.sock, trains what arrives, and stops on SIGTERM.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
from apollo_worker.front.server import Server
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import Admission, StatusBoard
from planned import plan_of

from apollo_ipc.config import load_config
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Example, TrainRequest


def request_of(text="hello", num=1):
    """The body of a Submit."""
    return msgspec.json.encode(TrainRequest([Example(prompt="say", completion=text)] * num))


def admit(request):
    """A step an example. The texts `slow`, `bad` and `bug` do what they say."""
    text = request.examples[0].completion
    if text == "slow":
        time.sleep(2.0)
    if text == "bad":
        raise UserError("nothing to learn", field="examples[0].completion", code="invalid_example")
    if text == "bug":
        raise ZeroDivisionError("a bug in admit")
    return Admission(plan_of(request, len(request.examples)), notes=["admitted"])


def config_in(directory):
    return load_config(
        environ={},
        overrides={
            "paths.runtime_dir": str(directory),
            "paths.state_dir": str(directory),
            "train.publish_distance_s": 0,
        },
    )


@contextmanager
def short_dir():
    """A directory whose path leaves room for a socket's name (107 bytes; pytest's own are longer)."""
    directory = Path(tempfile.mkdtemp(prefix="apollo-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def start_service(directory):
    """(service, board, queue) in this process; the test is the main thread."""
    config, board = config_in(directory), StatusBoard(admit)
    queue = JobQueue(directory / "queue.sqlite", max_queued=1000)
    service = Server(config, board, queue)
    service.start()
    return service, board, queue


@contextmanager
def serving(directory):
    service, board, queue = start_service(directory)
    try:
        yield service, board, queue
    finally:
        service.stop()
        queue.close()


def start_worker(directory, step_s=0.0):
    """A worker process that is ready. End it with `end`."""
    child = subprocess.Popen(
        [sys.executable, __file__, str(directory), str(step_s)], stdout=subprocess.PIPE, text=True
    )
    ready, _, _ = select.select([child.stdout], [], [], 20)
    line = child.stdout.readline() if ready else ""
    assert line == "ready\n", f"the worker did not start: {line!r}"
    return child


def end(child, with_signal=signal.SIGKILL):
    if child.poll() is None:
        os.kill(child.pid, with_signal)
    child.wait(timeout=20)
    child.stdout.close()


def thread_states(pid):
    """Field 3 of proc(5)'s stat, for each thread."""
    stats = (task / "stat" for task in Path(f"/proc/{pid}/task").iterdir())
    return [stat.read_text().rpartition(")")[2].split()[0] for stat in stats]


def main(directory, step_s):
    service, board, queue = start_service(directory)
    signal.signal(signal.SIGTERM, lambda *_: board.stopping.set())
    print("ready", flush=True)
    while not board.stopping.is_set():
        if (job := queue.take()) is None:
            board.show("idle")
            board.wake.wait(0.1)  # a signal wakes nobody: `wake` has a lock (see apollo_ipc.process.flag)
            board.wake.clear()
            continue
        train(job.info, step_s, board, queue, service)
    service.stop()
    queue.close()


def train(info, step_s, board, queue, service):
    for step in range(info.steps_done + 1, info.num_steps + 1):
        if board.stopping.is_set():
            queue.release(info.job_id)
            return
        if queue.is_cancel_requested(info.job_id):
            queue.finish(info.job_id, "cancelled")
            return
        time.sleep(step_s)
        queue.record_step(info.job_id, step, 1.0 / step)
        board.show("training", job_id=info.job_id, steps_done=step, num_steps=info.num_steps)
    board.state.weight_version += 1
    service.publish(board.state.weight_version, timeout_s=1.0)
    queue.finish(info.job_id, "applied", weight_version=board.state.weight_version)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
