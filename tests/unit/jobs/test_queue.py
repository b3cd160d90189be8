"""The job queue: what it promises holds across threads, processes and kill -9."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.jobs.queue_file import SCHEMA_VERSION, QueueDamaged

from apollo_ipc.errors import Conflict, NotFound, NotReady
from apollo_ipc.wire.requests import Example, TrainOptions, TrainRequest


def request_of(text="hello", **options):
    return TrainRequest(examples=[Example(prompt="say", completion=text)], options=TrainOptions(**options))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "queue.sqlite"


@pytest.fixture
def queue(path):
    queue = JobQueue(path, max_queued=100)
    yield queue
    queue.close()


def reopen(queue, path):
    queue.close()
    return JobQueue(path, max_queued=100)


def test_jobs_are_taken_in_the_order_in_which_they_were_accepted(queue):
    jobs = [queue.submit(request_of(str(i)), num_steps=1, notes=["n"]) for i in range(5)]
    assert [job.job_id for job in jobs] == sorted(job.job_id for job in jobs) or len(
        {job.job_id.split("-")[1] for job in jobs}
    ) < 5  # two within one millisecond may sort either way
    taken = []
    while job := queue.take():
        assert queue.take() == job  # the running one again, not the next
        taken.append(job.request.examples[0].completion)
        queue.record_step(job.info.job_id, 1, 0.5)
        queue.finish(job.info.job_id, "applied", weight_version=len(taken), notes=["m"])
    assert taken == ["0", "1", "2", "3", "4"]
    last = queue.get(jobs[-1].job_id, with_history=True)
    assert (last.state, last.weight_version, last.notes) == ("applied", 5, ["n", "m"])
    assert (last.loss_first, last.loss_last, last.loss_history) == (0.5, 0.5, [0.5])


def test_the_file_and_its_companions_are_private(queue, path):
    queue.submit(request_of(), num_steps=1)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    assert len(modes) == 3  # with -wal and -shm
    assert path.parent.stat().st_mode & 0o777 == 0o700


CHILD = """
import sys
from pathlib import Path
from apollo_ipc.wire.requests import Example, TrainRequest
from apollo_worker.jobs.queue import JobQueue
queue = JobQueue(Path(sys.argv[1]), 10)
if sys.argv[2] == "submit":
    job = queue.submit(TrainRequest([Example(prompt="a", completion="b")]), num_steps=3, idempotency_key="k")
else:
    job = queue.take().info
    queue.record_step(job.job_id, job.steps_done + 1, 2.5)
print(job.job_id, flush=True)
sys.stdin.read()
"""


def run_and_kill(path, what):
    """A process that does `what` and is killed -9 with the file open; the job_id that it printed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    job_id = child.stdout.readline().strip()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    return job_id


def test_a_job_outlives_kill_9_right_after_submit_returned(path):
    job_id = run_and_kill(path, "submit")
    queue = JobQueue(path, 10)
    assert queue.get(job_id).state == "queued"
    # The reply was lost, so the client sends it again: the same job, not a second one.
    again = queue.submit(
        TrainRequest([Example(prompt="a", completion="b")]), num_steps=3, idempotency_key="k"
    )
    assert again.job_id == job_id
    assert queue.count_queued() == 1


def test_a_killed_worker_resumes_after_its_last_recorded_step_and_is_quarantined_after_three(path):
    job_id = run_and_kill(path, "submit")
    for steps_done in (1, 2):
        assert run_and_kill(path, "train") == job_id
        queue = JobQueue(path, 10)
        info = queue.get(job_id, with_history=True)
        assert (info.state, info.steps_done, info.loss_history) == ("running", steps_done, [2.5] * steps_done)
        queue.close()
    run_and_kill(path, "train")
    queue = JobQueue(path, 10)
    other = queue.submit(request_of(), num_steps=1)
    assert queue.take().info.job_id == other.job_id  # goes on with the next one
    info = queue.get(job_id)
    assert info.state == "quarantined"
    assert "died 3 times" in info.error
    assert info.ended_at is not None


def test_a_clean_stop_does_not_count_as_a_crash(queue, path):
    job_id = queue.submit(request_of(), num_steps=9).job_id
    for _ in range(6):
        job = queue.take()
        assert job.info.job_id == job_id
        assert queue.take().info.state == "running"  # taking twice in one process counts once
        queue.release(job_id)
        queue = reopen(queue, path)
    assert queue.take().info.job_id == job_id


def test_an_idempotency_key_gives_the_same_job_and_refuses_another_body(queue):
    tools = [{"type": "function", "name": "f"}], [{"name": "f", "type": "function"}]
    first, same = (
        TrainRequest([Example(messages=[], tools=tool)]) for tool in tools
    )  # the order of keys in JSON means nothing
    job = queue.submit(first, num_steps=1, idempotency_key="k")
    assert queue.find_by_key("k", same) == job
    assert queue.submit(same, num_steps=1, idempotency_key="k") == job
    for ask in (queue.find_by_key, lambda k, r: queue.submit(r, num_steps=1, idempotency_key=k)):
        with pytest.raises(Conflict, match=job.job_id) as caught:
            ask("k", request_of(lr=1e-4))
        assert (caught.value.http_status, caught.value.field) == (422, "idempotency_key")
    assert queue.find_by_key("other", first) is None
    assert queue.find_by_key(None, first) is None
    assert queue.submit(first, num_steps=1).job_id != queue.submit(first, num_steps=1).job_id


def test_a_key_that_many_threads_use_at_once_makes_one_job(queue):
    jobs = []
    threads = [
        threading.Thread(
            target=lambda: jobs.append(queue.submit(request_of(), num_steps=1, idempotency_key="k"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs) == 8
    assert len({job.job_id for job in jobs}) == 1


def test_a_full_queue_refuses_new_jobs_but_still_knows_the_accepted_ones(path):
    queue = JobQueue(path, max_queued=2)
    first = queue.submit(request_of("1"), num_steps=1, idempotency_key="k")
    queue.submit(request_of("2"), num_steps=1)
    with pytest.raises(NotReady) as caught:
        queue.submit(request_of("3"), num_steps=1)
    assert caught.value.code == "queue_full"
    assert queue.submit(request_of("1"), num_steps=1, idempotency_key="k") == first
    queue.take()  # running is not waiting
    queue.submit(request_of("3"), num_steps=1)


def test_cancelling_depends_on_the_state(queue, path):
    running, waiting = (queue.submit(request_of(str(i)), num_steps=1).job_id for i in range(2))
    queue.take()
    assert queue.cancel(waiting).state == "cancelled"
    assert not queue.is_cancel_requested(running)
    assert queue.cancel(running).state == "running"
    assert queue.is_cancel_requested(running)
    queue = reopen(queue, path)  # a restart has not forgotten it
    assert queue.is_cancel_requested(running)
    queue.finish(queue.take().info.job_id, "cancelled")
    for job_id in (running, waiting):
        with pytest.raises(Conflict, match="has ended") as caught:
            queue.cancel(job_id)
        assert caught.value.http_status == 409
    with pytest.raises(NotFound):
        queue.cancel("job-unknown")


def test_steps_do_not_go_backward_and_nan_stays_nan(queue):
    job_id = queue.submit(request_of(), num_steps=3).job_id
    queue.take()
    queue.record_step(job_id, 1, 3.0)
    queue.record_step(job_id, 2, math.nan)
    with pytest.raises(AssertionError):
        queue.record_step(job_id, 1, 3.0)
    history = queue.get(job_id, with_history=True).loss_history
    assert history[0] == 3.0
    assert math.isnan(history[1])
    assert queue.get(job_id).steps_done == 2


def finish_all(queue):
    while job := queue.take():
        queue.remember_examples(job.info.job_id, [job.info.job_id.encode()])
        queue.record_step(job.info.job_id, 1, 1.0)
        queue.finish(job.info.job_id, "applied", weight_version=job.info.seq)


def test_applied_becomes_durable_up_to_the_synced_job(queue):
    assert queue.applied_seq() == 0
    jobs = [queue.submit(request_of(str(i)), num_steps=1) for i in range(3)]
    queue.cancel(jobs[2].job_id)
    assert queue.applied_seq() == 0  # the first has not ended
    finish_all(queue)
    assert queue.applied_seq() == jobs[2].seq
    assert [job.job_id for job in queue.mark_durable(jobs[0].seq)] == [jobs[0].job_id]
    assert [job.state for job in queue.list()] == ["cancelled", "applied", "durable"]  # newest first
    assert [job.seq for job in queue.list(limit=1, state="durable")] == [jobs[0].seq]
    assert queue.mark_durable(jobs[0].seq) == []


def test_after_lost_weights_the_jobs_behind_the_checkpoint_train_again_in_order(queue):
    jobs = [queue.submit(request_of(str(i)), num_steps=1) for i in range(4)]
    queue.cancel(jobs[2].job_id)
    finish_all(queue)
    queue.reconcile(jobs[0].seq)
    assert [job.state for job in reversed(queue.list())] == ["durable", "queued", "cancelled", "queued"]
    assert queue.known_examples([job.job_id.encode() for job in jobs]) == {jobs[0].job_id.encode()}
    again = queue.take()
    assert (again.info.job_id, again.info.steps_done) == (jobs[1].job_id, 0)
    assert queue.get(jobs[1].job_id, with_history=True).loss_history == []


def test_a_checkpoint_from_inside_a_job_rewinds_it_to_that_step(queue):
    jobs = [queue.submit(request_of(str(i)), num_steps=3) for i in range(2)]
    queue.take()
    for step in (1, 2, 3):
        queue.record_step(jobs[0].job_id, step, 10.0 - step)
    queue.finish(jobs[0].job_id, "applied", weight_version=1)
    queue.take()
    queue.record_step(jobs[1].job_id, 1, 1.0)
    queue.reconcile(0, jobs[0].job_id, steps_done=2)
    job = queue.take()
    assert (job.info.job_id, job.info.steps_done, job.info.loss_last) == (jobs[0].job_id, 2, 8.0)
    assert queue.get(jobs[0].job_id, with_history=True).loss_history == [9.0, 8.0]
    assert queue.get(jobs[1].job_id).state == "queued"


def test_examples_are_known_once_remembered(queue):
    job_id = queue.submit(request_of(), num_steps=1).job_id
    hashes = [i.to_bytes(16, "big") for i in range(1200)]
    queue.remember_examples(job_id, hashes[:1000])
    queue.remember_examples(job_id, hashes[:1000])
    assert queue.known_examples(hashes) == set(hashes[:1000])
    assert queue.known_examples([]) == set()


def test_every_commit_is_told_to_the_listener_outside_the_lock(queue):
    seen = []

    def listen(info):
        # Another thread can use the queue meanwhile, so the lock is free.
        thread = threading.Thread(target=queue.count_queued)
        thread.start()
        thread.join(timeout=5)
        assert not thread.is_alive()
        seen.append((info.state, info.steps_done))

    queue.on_change = listen
    job_id = queue.submit(request_of(), num_steps=1).job_id
    queue.take()
    queue.record_step(job_id, 1, 0.1)
    queue.finish(job_id, "applied", weight_version=1)
    queue.mark_durable(1)
    assert seen == [("queued", 0), ("running", 0), ("running", 1), ("applied", 1), ("durable", 1)]


@pytest.mark.parametrize("damage", ["garbage", "middle"])
def test_a_damaged_file_says_what_to_do(path, damage):
    queue = JobQueue(path, 1000)
    for i in range(200):
        queue.submit(request_of(str(i) * 100), num_steps=1)
    queue.close()
    with path.open("r+b") as file:
        file.seek(0 if damage == "garbage" else 4096 * 4)
        file.write(b"\xff" * 4096 * 3)
    with pytest.raises(QueueDamaged, match="move the file away") as caught:
        JobQueue(path, 1000)
    assert caught.value.exit_code == 78


def test_a_newer_schema_is_refused_by_number(path):
    JobQueue(path, 10).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(QueueDamaged, match=f"schema version {SCHEMA_VERSION + 1}"):
        JobQueue(path, 10)


def test_a_failed_transaction_leaves_the_queue_usable(queue):
    with pytest.raises(NotFound):
        queue.remember_examples("job-unknown", [b"x"])
    assert queue.submit(request_of(), num_steps=1).state == "queued"
    assert queue.known_examples([b"x"]) == set()
