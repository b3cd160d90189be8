"""The worker's two processes: the real front and link, and a trainer that only sleeps its steps."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from fake_trainer import CRASH, FULL_DISK, HANG, NORMAL
from fake_worker import short_dir
from places import SUPPORT
from waiting import wait_for

from apollo_ipc.errors import NotReady, UserError
from apollo_ipc.wire.client import call
from apollo_ipc.wire.messages import ACK_TIMEOUT_S, CancelJob, GetJob, GetStatus, Submit, SyncCheckpoint
from apollo_ipc.wire.requests import Example, TrainOptions, TrainRequest

FAKE_FRONT = SUPPORT / "fake_front.py"


class Worker:
    """A front in a process of its own, and its trainers."""

    def __init__(self, directory, step_s, step_timeout_s):
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, FAKE_FRONT, directory, str(step_s), str(step_timeout_s)]
        )

    def ask(self, message, timeout_s=20.0):
        return call(self.directory / "worker.sock", message, timeout_s=timeout_s)

    def status(self):
        return self.ask(GetStatus("")).status

    def submit(self, kind=NORMAL, num=1, **options):
        example = Example(context_ids=[kind], continuation_ids=[2, 3])
        request = TrainRequest([example] * num, TrainOptions(**options))
        return self.ask(Submit("", msgspec.json.encode(request))).job.job_id

    def job(self, job_id):
        return self.ask(GetJob("", job_id)).job

    def lines(self, name):
        path = self.directory / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def trainers(self):
        return [int(line[0]) for line in self.lines("trainers")]

    def is_attached(self):
        try:
            return self.status().attached
        except NotReady:
            return False

    def wait_until_attached(self, num_trainers=1):
        wait_for(lambda: len(self.trainers()) >= num_trainers and self.is_attached())
        return self.trainers()[-1]


@contextmanager
def worker_in(directory, step_s=0.05, step_timeout_s=30.0):
    worker = Worker(directory, step_s, step_timeout_s)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()
        for pid in worker.trainers():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def directory():
    with short_dir() as directory:
        yield directory


@pytest.fixture
def worker(directory):
    with worker_in(directory) as worker:
        worker.wait_until_attached()
        yield worker


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_goes_through_both_processes_and_status_shows_the_trainer(worker):
    job_id = worker.submit(num=3, rank=64)
    job = wait_for(lambda: (job := worker.job(job_id)).state == "applied" and job)
    assert (job.steps_done, job.weight_version) == (3, 1)
    assert job.notes[0].startswith("rank 64 is above the smaller dimension of 1 matrices (e.g. a)")
    status = wait_for(lambda: (s := worker.status()).weight_version == 1 and s)
    assert (status.worker_pid, status.vllm_boot_id) == (worker.process.pid, "boot-a")
    assert status.num_parameters_mapped == 3


def test_requests_are_checked_by_the_front_also_while_there_is_no_trainer(worker):
    os.kill(worker.trainers()[-1], signal.SIGSTOP)
    with pytest.raises(UserError, match="not in the vocabulary"):
        worker.submit(kind=100)
    assert worker.job(worker.submit()).state == "queued"


def test_cancel_and_sync_reach_the_trainer_in_a_running_job(worker):
    job_id = worker.submit(num=1000)
    wait_for(lambda: worker.job(job_id).steps_done > 1)
    assert worker.ask(SyncCheckpoint("")).sync.bytes_written == 10
    worker.ask(CancelJob("", job_id))
    wait_for(lambda: worker.job(job_id).state == "cancelled", timeout_s=3.0)
    assert worker.status().progress.steps_done < 1000


def test_what_ended_a_trainer_stays_in_the_status_when_the_next_one_works(worker):
    job_id = worker.submit(kind=FULL_DISK)
    wait_for(lambda: worker.job(job_id).state == "applied")
    status = worker.status()
    assert status.attached
    assert status.attach_error is None
    assert status.trainer_error == (
        "the trainer ended with status 1 (OperationalError: database or disk is full)"
    )


def test_a_killed_trainer_is_started_again_and_its_job_goes_on_where_it_was(worker):
    job_id, first = worker.submit(num=40), worker.trainers()[-1]
    wait_for(lambda: worker.job(job_id).steps_done > 5)
    count = worker.status().progress.activity_count
    os.kill(first, signal.SIGKILL)
    gone = wait_for(lambda: not (status := worker.status()).attached and status)
    assert gone.progress.activity == "trainer restarting"
    assert "SIGKILL" in gone.attach_error
    assert gone.progress.activity_count > count
    with pytest.raises(NotReady, match="SIGKILL"):
        worker.ask(SyncCheckpoint(""))
    assert worker.wait_until_attached(num_trainers=2) != first
    wait_for(lambda: worker.job(job_id).state == "applied")
    ends = [int(line[1]) for line in worker.lines("steps") if line[2] == "end"]
    assert sorted(set(ends)) == list(range(1, 41))
    assert len(ends) <= 41  # at most the one that had ended and was not recorded


def test_a_job_that_kills_three_trainers_is_quarantined_and_the_next_one_trains(worker):
    bad, good = worker.submit(CRASH), worker.submit()
    assert wait_for(lambda: (job := worker.job(bad)).state == "quarantined" and job).error
    wait_for(lambda: worker.job(good).state == "applied")
    assert len(worker.trainers()) == 4


def stop_outside_a_transaction(worker, pid):
    """A trainer stopped in a transaction keeps the queue's lock, and a submit is rightly answered `busy`."""
    for _ in range(50):
        os.kill(pid, signal.SIGSTOP)
        try:
            worker.submit()
        except NotReady as error:
            if error.code != "busy":
                raise
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)
        else:
            return
    pytest.fail("stopped in a transaction each time")


def test_a_stopped_trainer_delays_no_status(worker):
    worker.submit(num=1000)
    pid = worker.trainers()[-1]
    wait_for(lambda: worker.status().progress.activity == "training")
    stop_outside_a_transaction(worker, pid)
    took_s = []
    for _ in range(50):  # more than its socket's buffer takes would come later: a Wake for each
        started = time.monotonic()
        worker.submit()
        worker.status()
        took_s.append(time.monotonic() - started)
    # A front that waits for its trainer does so each time; on a loaded machine one of them may be late.
    assert statistics.median(took_s) < 2 * ACK_TIMEOUT_S
    os.kill(pid, signal.SIGCONT)
    count = worker.status().progress.activity_count
    wait_for(lambda: worker.status().progress.activity_count > count)
    assert worker.trainers() == [pid]


def test_a_trainer_that_hangs_is_killed_and_replaced(directory):
    with worker_in(directory, step_timeout_s=1.5) as worker:
        first = worker.wait_until_attached()
        job_id = worker.submit(HANG)
        wait_for(lambda: worker.job(job_id).state == "quarantined", timeout_s=40)
        assert not is_alive(first)
        assert len(worker.trainers()) >= 3


def test_stopping_lets_the_step_end_and_the_job_stays_for_the_next_worker(directory):
    with worker_in(directory, step_s=0.5) as worker:
        pid = worker.wait_until_attached()
        job_id = worker.submit(num=10)
        wait_for(lambda: worker.lines("steps"))
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(10) == 0
        assert not is_alive(pid)
        begun, ended = ([x for x in worker.lines("steps") if x[2] == kind] for kind in ("begin", "end"))
        assert len(begun) == len(ended) < 10
        assert worker.lines("ends") == [[str(pid), "True"]]
    with worker_in(directory) as worker:
        wait_for(lambda: worker.is_attached() and worker.job(job_id).state == "applied")


def test_a_trainer_without_its_front_ends_after_its_step_and_the_next_one_waits_for_that(directory):
    with worker_in(directory, step_s=6.0) as worker:
        old = worker.wait_until_attached()
        job_id = worker.submit(num=3)
        wait_for(lambda: worker.lines("steps"))
        worker.process.kill()
        worker.process.wait()
        with worker_in(directory, step_s=0.01) as successor:
            waiting = wait_for(lambda: is_waiting(successor))
            assert f"pid {old}" in waiting.attach_error
            assert successor.trainers() == [old]
            assert is_alive(old)
            wait_for(lambda: not is_alive(old), timeout_s=15)
            wait_for(lambda: successor.job(job_id).state == "applied")
            steps = [(int(pid), int(step), kind) for pid, step, kind in successor.lines("steps")]
            assert steps[:2] == [(old, 1, "begin"), (old, 1, "end")]
            assert all(pid != old for pid, _, _ in steps[2:])
            assert steps[2][1] == 2
            assert successor.lines("ends") == [[str(old), "False"]]


def is_waiting(worker):
    try:
        status = worker.status()
    except NotReady:
        return None
    return status if status.progress.activity == "waiting for the old trainer" else None


def test_a_front_imports_no_torch():
    code = (
        "import sys, apollo_worker.front.front\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False False\n", done.stderr
