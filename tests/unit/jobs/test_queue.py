"""The job queue: what it promises holds across threads, processes and kill -9."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from apollo_worker.jobs.example import request_digest
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.jobs.references import References
from places import ROOT, SUPPORT
from planned import hash_of, reopen, request_of, submit, text_of

from apollo_ipc.errors import Conflict, NotFound, NotReady
from apollo_ipc.wire.requests import Example, TrainRequest

ASSETS = ROOT / "tests" / "assets"


def test_jobs_are_taken_in_the_order_in_which_they_were_accepted(queue):
    jobs = [submit(queue, request_of(str(i)), num_steps=1, notes=["n"]) for i in range(5)]
    assert [job.job_id for job in jobs] == sorted(job.job_id for job in jobs) or len(
        {job.job_id.split("-")[1] for job in jobs}
    ) < 5  # two within one millisecond may sort either way
    taken = []
    while job := queue.take():
        assert queue.take() == job  # the running one again, not the next
        taken.append(text_of(job))
        queue.record_step(job.info.job_id, 1, 0.5)
        queue.finish(job.info.job_id, "applied", weight_version=len(taken), notes=["m"])
    assert taken == ["0", "1", "2", "3", "4"]
    last = queue.get(jobs[-1].job_id, with_history=True)
    assert (last.state, last.weight_version, last.notes) == ("applied", 5, ["n", "m"])
    assert (last.loss_first, last.loss_last, last.loss_history) == (0.5, 0.5, [0.5])


def test_the_file_and_its_companions_are_private(queue, path):
    submit(queue, request_of(), num_steps=1)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    assert len(modes) == 3  # with -wal and -shm
    assert path.parent.stat().st_mode & 0o777 == 0o700


CHILD = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path

from apollo_ipc.wire.requests import Example, TrainRequest
from apollo_worker.jobs.queue import JobQueue
from planned import submit
queue = JobQueue(Path(sys.argv[1]), 10)
if sys.argv[2] == "submit":
    job = submit(queue, TrainRequest([Example(prompt="a", completion="b")]), num_steps=3, idempotency_key="k")
else:
    job = queue.take().info
    if sys.argv[2] == "train":
        queue.record_step(job.job_id, job.steps_done + 1, 2.5)
print(job.job_id, flush=True)
sys.stdin.read()
"""


def run_and_kill(path, what):
    """A process that does `what` and is killed -9 with the file open; the job_id that it printed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), what, str(SUPPORT)],
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
    again = submit(
        queue, TrainRequest([Example(prompt="a", completion="b")]), num_steps=3, idempotency_key="k"
    )
    assert again.job_id == job_id
    assert queue.count("queued") == 1


def test_a_killed_worker_resumes_after_its_last_recorded_step(path):
    job_id = run_and_kill(path, "submit")
    for steps_done in (1, 2, 3):
        assert run_and_kill(path, "train") == job_id
        queue = JobQueue(path, 10)
        info = queue.get(job_id, with_history=True)
        assert (info.state, info.steps_done, info.loss_history) == ("running", steps_done, [2.5] * steps_done)
        queue.close()


def test_a_job_that_kills_three_workers_before_its_first_step_is_quarantined(path):
    job_id = run_and_kill(path, "submit")
    for _ in range(3):
        assert run_and_kill(path, "take") == job_id
    queue = JobQueue(path, 10)
    other = submit(queue, request_of(), num_steps=1)
    assert queue.take().info.job_id == other.job_id  # goes on with the next one
    assert queue.get(job_id).state == "quarantined"
    queue.close()


def test_a_clean_stop_does_not_count_as_a_crash(queue, path):
    job_id = submit(queue, request_of(), num_steps=9).job_id
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
    job = submit(queue, first, num_steps=1, idempotency_key="k")
    assert queue.find_by_key("k", request_digest(same)) == job
    assert submit(queue, same, num_steps=1, idempotency_key="k") == job
    find = lambda k, r: queue.find_by_key(k, request_digest(r))  # noqa: E731
    for ask in (find, lambda k, r: submit(queue, r, num_steps=1, idempotency_key=k)):
        with pytest.raises(Conflict, match=job.job_id) as caught:
            ask("k", request_of(lr=1e-4))
        assert (caught.value.http_status, caught.value.field) == (422, "idempotency_key")
    assert queue.find_by_key("other", request_digest(first)) is None
    assert queue.find_by_key(None, request_digest(first)) is None
    assert submit(queue, first, num_steps=1).job_id != submit(queue, first, num_steps=1).job_id


def test_a_key_that_many_threads_use_at_once_makes_one_job(queue):
    jobs = []
    threads = [
        threading.Thread(
            target=lambda: jobs.append(submit(queue, request_of(), num_steps=1, idempotency_key="k"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs) == 8
    assert len({job.job_id for job in jobs}) == 1


def test_a_paused_job_holds_up_those_behind_it_until_it_is_resumed_or_cancelled(queue, path):
    first, second = (submit(queue, request_of(str(i)), num_steps=1).job_id for i in range(2))
    assert queue.pause(first).paused_at is not None
    assert (queue.take(), queue.is_paused()) == (None, True)
    assert queue.resume(first).paused_at is None
    assert queue.take().info.job_id == first
    queue.pause(first)
    queue.release(first)
    queue = reopen(queue, path)  # a restart has not forgotten it
    assert (queue.take(), queue.get(first).state) == (None, "running")
    queue.cancel(first)
    assert queue.take().info.job_id == first, "so that the trainer ends it"
    queue.finish(first, "cancelled")
    assert queue.take().info.job_id == second
    queue.pause(second)
    assert queue.finish(second, "applied", weight_version=1).paused_at is None
    for control in (queue.pause, queue.resume):
        with pytest.raises(Conflict, match="has ended") as caught:
            control(second)
        assert caught.value.http_status == 409
    queue.close()


def test_references_are_read_as_they_were_written_and_go_with_the_weights_they_are_of(queue):
    first, second = (submit(queue, request_of(text), num_steps=2).job_id for text in "ab")
    values = [-0.1, -1e-30, -17.25]
    rows = torch.tensor(values).tolist()
    for job_id in (first, second):
        References(queue, job_id).add([(0, rows), (3, rows[:1])])
    assert References(queue, first).known() == {0: rows, 3: rows[:1]}
    queue.take()
    queue.record_step(first, 1, 1.0)
    # The checkpoint holds the first step of the first job: it goes on, and is measured against the same.
    queue.reconcile(0, first, 1)
    assert References(queue, first).known() == {0: rows, 3: rows[:1]}
    queue.reconcile(0)
    assert References(queue, first).known() == {}, "it starts anew, on the weights as they are then"
    assert References(queue, second).known() == {0: rows, 3: rows[:1]}
    queue.take()
    queue.finish(first, "failed")
    References(queue, first).add([(0, rows)])
    queue.forget_plans(time.time() + 1)
    assert References(queue, first).known() == {}


def test_a_full_queue_refuses_new_jobs_but_still_knows_the_accepted_ones(path):
    queue = JobQueue(path, max_queued=2)
    first = submit(queue, request_of("1"), num_steps=1, idempotency_key="k")
    submit(queue, request_of("2"), num_steps=1)
    with pytest.raises(NotReady) as caught:
        submit(queue, request_of("3"), num_steps=1)
    assert caught.value.code == "queue_full"
    assert submit(queue, request_of("1"), num_steps=1, idempotency_key="k") == first
    queue.take()  # running is not waiting
    submit(queue, request_of("3"), num_steps=1)


def test_cancelling_depends_on_the_state(queue, path):
    running, waiting = (submit(queue, request_of(str(i)), num_steps=1).job_id for i in range(2))
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
    job_id = submit(queue, request_of(), num_steps=3).job_id
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
        queue.record_step(job.info.job_id, 1, 1.0)
        queue.finish(job.info.job_id, "applied", weight_version=job.info.seq)


def test_applied_becomes_durable_up_to_the_synced_job(queue):
    assert queue.applied_seq() == 0
    jobs = [submit(queue, request_of(str(i)), num_steps=1) for i in range(3)]
    queue.cancel(jobs[2].job_id)
    assert queue.applied_seq() == 0  # the first has not ended
    finish_all(queue)
    assert queue.applied_seq() == jobs[2].seq
    assert [job.job_id for job in queue.mark_durable(jobs[0].seq)] == [jobs[0].job_id]
    assert [job.state for job in queue.list()] == ["cancelled", "applied", "durable"]  # newest first
    assert [job.seq for job in queue.list(limit=1, state="durable")] == [jobs[0].seq]
    assert queue.mark_durable(jobs[0].seq) == []


def test_after_lost_weights_the_jobs_behind_the_checkpoint_train_again_in_order(queue):
    jobs = [submit(queue, request_of(str(i)), num_steps=1) for i in range(4)]
    queue.cancel(jobs[2].job_id)
    finish_all(queue)
    queue.reconcile(jobs[0].seq)
    assert [job.state for job in reversed(queue.list())] == ["durable", "queued", "cancelled", "queued"]
    again = queue.take()
    assert (again.info.job_id, again.info.steps_done) == (jobs[1].job_id, 0)
    assert queue.get(jobs[1].job_id, with_history=True).loss_history == []


def test_a_checkpoint_from_inside_a_job_rewinds_it_to_that_step(queue):
    jobs = [submit(queue, request_of(str(i)), num_steps=3) for i in range(2)]
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


def test_examples_are_known_from_submit_until_their_job_ends_without_training_them(queue):
    kept, cancelled, failed = (submit(queue, request_of(text)) for text in ("kept", "cancelled", "failed"))
    hashes = {text: hash_of(text) for text in ("kept", "cancelled", "failed", "other")}
    assert queue.known_examples(hashes.values()) == {hashes[x] for x in ("kept", "cancelled", "failed")}
    queue.cancel(cancelled.job_id)
    queue.take()
    queue.finish(kept.job_id, "applied", weight_version=1)
    queue.take()
    queue.finish(failed.job_id, "failed", error="x")
    assert queue.known_examples(hashes.values()) == {hashes["kept"]}
    queue.restored(0, 3, weight_version=7, new_version=9)
    assert (queue.get(kept.job_id).state, queue.get(kept.job_id).undone_by) == ("undone", 7)
    assert queue.known_examples(hashes.values()) == set()


def test_known_examples_of_more_hashes_than_one_statement_takes(queue):
    texts = [str(i) for i in range(1200)]
    request = TrainRequest([Example(prompt="say", completion=text) for text in texts[:1000]])
    submit(queue, request, num_steps=1000)
    assert queue.known_examples(map(hash_of, texts)) == {hash_of(text) for text in texts[:1000]}
    assert queue.known_examples([]) == set()


def test_only_what_the_steps_reach_is_known(queue):
    submit(queue, TrainRequest([Example(prompt="say", completion=text) for text in "ab"]), num_steps=1)
    assert queue.known_examples(map(hash_of, "ab")) == {hash_of("a")}
