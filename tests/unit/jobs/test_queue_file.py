"""What the queue's file holds: older files, damage, whose turn it is, and who is to blame."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time

import msgspec
import pytest
from apollo_worker.jobs import queue_file
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.jobs.queue_file import QueueDamaged
from apollo_worker.jobs.queue_schema import SCHEMA_VERSION
from apollo_worker.jobs.references import References
from places import ROOT
from planned import hash_of, plan_of, reopen, request_of, states, submit, text_of

from apollo_ipc.errors import NotFound
from apollo_ipc.wire.requests import TrainRequest


def test_a_queue_of_schema_2_is_taken_over(queue, path):
    job_id = submit(queue, request_of(), num_steps=1).job_id
    queue.close()
    with sqlite3.connect(path) as db:
        make_schema_3(db)
        db.execute("ALTER TABLE jobs DROP COLUMN paused_at")
        db.execute("PRAGMA user_version = 2")
    queue = JobQueue(path, 10)
    assert queue.pause(job_id).paused_at is not None
    queue.close()


def make_schema_4(db: sqlite3.Connection) -> None:
    db.executescript("ALTER TABLE jobs DROP COLUMN restores; PRAGMA user_version = 4;")


def make_schema_3(db: sqlite3.Connection) -> None:
    make_schema_4(db)
    db.executescript(
        "ALTER TABLE jobs DROP COLUMN loss; DROP TABLE advantages; DROP TABLE reference_logprobs; "
        "PRAGMA user_version = 3;"
    )


def test_a_queue_of_schema_4_is_taken_over(queue, path):
    """When a job was undone then nobody wrote down, so it stays undone."""
    undone, kept = (submit(queue, request_of(text)).job_id for text in "ab")
    for job_id in (undone, kept):
        queue.take()
        queue.finish(job_id, "applied", weight_version=1)
    queue.restored(0, 1, weight_version=0, new_version=2)
    queue.close()
    with sqlite3.connect(path) as db:
        make_schema_4(db)
    queue = JobQueue(path, 10)
    assert queue.restored(2, 2, weight_version=1, new_version=3) == []
    assert (queue.get(undone).state, queue.get(kept).state) == ("undone", "applied")
    queue.restored(0, 2, weight_version=0, new_version=4)
    assert queue.get(kept).state == "undone"
    queue.close()


def test_a_queue_of_schema_3_is_taken_over(queue, path):
    job_id = submit(queue, request_of(), num_steps=1).job_id
    queue.close()
    with sqlite3.connect(path) as db:
        make_schema_3(db)
    queue = JobQueue(path, 10)
    info = queue.get(job_id, with_history=True)
    assert (info.loss, info.advantages) == ("cross_entropy", None)
    assert References(queue, job_id).known() == {}
    queue.close()


def test_a_job_that_had_begun_is_queued_again_behind_those_before_it(queue):
    """A running job without a step used to overtake the jobs that were lost with the weights."""
    jobs = [submit(queue, request_of(str(i)), num_steps=1) for i in range(5)]
    for _ in range(4):
        job_id = queue.take().info.job_id
        queue.record_step(job_id, 1, 1.0)
        queue.finish(job_id, "applied", weight_version=1)
    queue.release(queue.take().info.job_id)  # vLLM dies in the fifth one's first step
    queue.reconcile(0)
    assert states(queue) == ["queued"] * 5
    assert queue.take().info.job_id == jobs[0].job_id


def test_the_file_refuses_a_second_running_job_and_one_before_its_turn(queue, path):
    for i in range(3):
        submit(queue, request_of(str(i)))
    db = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="earlier job has not ended"):
        db.execute("UPDATE jobs SET state = 'running' WHERE seq = 2")
    db.execute("UPDATE jobs SET state = 'running' WHERE seq = 1")
    db.execute("DROP TRIGGER jobs_run_in_order")
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        db.execute("UPDATE jobs SET state = 'running' WHERE seq = 2")
    db.close()


def test_only_the_job_whose_step_kills_the_trainers_is_quarantined(queue, path):
    jobs = [submit(queue, request_of(str(i)), num_steps=5 if i == 3 else 1).job_id for i in range(4)]
    for process in range(4):  # job 3 kills each in its second step; no sync: all are trained again
        if process:
            queue = reopen(queue, path)
            queue.blame(jobs[3].removeprefix("job-"), 2)
            queue.reconcile(0)
        while job := queue.take():
            queue.record_step(job.info.job_id, 1, 1.0)
            if job.info.job_id == jobs[3]:
                break
            queue.finish(job.info.job_id, "applied", weight_version=1)
    assert states(queue) == ["applied"] * 3 + ["quarantined"]
    queue.close()


def test_progress_further_than_the_death_clears_the_blame(queue, path):
    job_id = submit(queue, request_of(), num_steps=9).job_id
    for step in range(1, 7):  # it dies once in every step, and each time gets one further
        queue.take()
        for done in range(queue.get(job_id).steps_done + 1, step):
            queue.record_step(job_id, done, 1.0)
        queue = reopen(queue, path)
        queue.blame(job_id, step)
    assert queue.take().info.state == "running"
    queue.close()


def test_examples_of_old_jobs_are_forgotten_and_results_stay(queue):
    old, waiting = (submit(queue, request_of(text)) for text in ("old", "waiting"))
    for job in (old, waiting):
        queue.take()
        queue.record_step(job.job_id, 1, 0.5)
        queue.finish(job.job_id, "applied", weight_version=1)
    queue.mark_durable(old.seq)
    assert queue.forget_plans(time.time() - 60) == 0
    assert queue.forget_plans(time.time() + 60) == 1, "the applied one may have to be trained again"
    assert queue.get(old.job_id, with_history=True).loss_history == [0.5]
    assert queue.known_examples([hash_of("old")]) == {hash_of("old")}
    queue.reconcile(0)  # the model directory was replaced by an older one
    assert states(queue) == ["undone", "queued"]
    assert "forgotten" in queue.get(old.job_id).notes[-1]


@pytest.mark.parametrize("is_large", [False, True])
def test_only_a_small_file_is_read_whole_when_it_is_opened(path, monkeypatch, is_large):
    JobQueue(path, 10).close()
    monkeypatch.setattr(queue_file, "MAX_CHECKED_BYTES", path.stat().st_size - is_large)
    said, connect = [], queue_file._connect

    def traced(*args, **kwargs):
        db = connect(*args, **kwargs)
        db.set_trace_callback(said.append)
        return db

    monkeypatch.setattr(queue_file, "_connect", traced)
    JobQueue(path, 10).close()
    assert any("quick_check" in statement for statement in said) != is_large
    assert said


def test_a_hundred_thousand_finished_jobs_open_at_once(path):
    JobQueue(path, 10).close()
    db = sqlite3.connect(path)
    db.executemany(
        "INSERT INTO jobs (job_id, state, created_at, num_examples, num_steps, num_skipped, request_digest, "
        "notes) VALUES (?, 'durable', 0, 1, 1, 0, x'00', '[]')",
        ((f"job-{i:012x}",) for i in range(100_000)),
    )
    db.commit()
    db.close()
    started = time.monotonic()
    queue = JobQueue(path, 10)
    assert queue.take() is None
    assert time.monotonic() - started < 2, "0.2 s on a quiet machine; reading the whole file takes longer"
    queue.close()


# --- a file of schema 1, as commit 8a34946 wrote it ---


@pytest.fixture
def older(path):
    path.parent.mkdir()
    shutil.copy(ROOT / "tests/assets" / "queue-schema-1.sqlite", path)
    queue = JobQueue(path, 10)
    yield queue
    queue.close()


def test_jobs_of_an_older_program_keep_their_place_and_wait_for_a_plan(older):
    assert states(older) == ["durable", "applied", "cancelled", "running", "queued", "queued"]
    assert older.take() is None, "the running one has no plan yet"
    unplanned = [job for job in older.unplanned() if older.get(job.job_id).state in ("running", "queued")]
    assert [job.num_steps for job in unplanned] == [4, 2, 1]
    request = msgspec.msgpack.decode(unplanned[0].request, type=TrainRequest)
    older.set_plan(unplanned[0].job_id, plan_of(request, 4))
    job = older.take()
    assert (job.info.steps_done, text_of(job)) == (1, "half done")
    older.finish(job.info.job_id, "applied", weight_version=3)
    assert older.take() is None, "each in its turn"
    older.refuse_unplanned(unplanned[1].job_id, "the template cannot show it")
    assert older.get(unplanned[1].job_id).error == "the template cannot show it"
    older.set_plan(unplanned[2].job_id, plan_of(request_of(), 1))
    assert older.take().info.job_id == unplanned[2].job_id


def test_examples_known_to_an_older_program_stay_known(older):
    assert older.known_examples([b"h" * 32]) == {b"h" * 32}


def test_every_commit_is_told_to_the_listener_outside_the_lock(queue):
    seen = []

    def listen(info):
        # Another thread can use the queue meanwhile, so the lock is free.
        thread = threading.Thread(target=queue.count, args=("queued",))
        thread.start()
        thread.join(timeout=5)
        assert not thread.is_alive()
        seen.append((info.state, info.steps_done))

    queue.on_change = listen
    job_id = submit(queue, request_of(), num_steps=1).job_id
    queue.take()
    queue.record_step(job_id, 1, 0.1)
    queue.finish(job_id, "applied", weight_version=1)
    queue.mark_durable(1)
    assert seen == [("queued", 0), ("running", 0), ("running", 1), ("applied", 1), ("durable", 1)]


@pytest.mark.parametrize("damage", ["garbage", "middle"])
def test_a_damaged_file_says_what_to_do(path, damage):
    queue = JobQueue(path, 1000)
    for i in range(200):
        submit(queue, request_of(str(i) * 100), num_steps=1)
    queue.close()
    with path.open("r+b") as file:
        file.seek(0 if damage == "garbage" else 4096 * 4)
        file.write(b"\xff" * 4096 * 3)
    with pytest.raises(QueueDamaged, match="move the file away") as caught:
        JobQueue(path, 1000)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    "change", ["state = 'durablu'", "notes = '[1'", "steps_done = 'x'", "notes = CAST(x'ff' AS TEXT)"]
)
def test_a_row_that_no_program_of_ours_wrote_is_damage(path, change):
    queue = JobQueue(path, 1000)
    job_id = submit(queue, request_of(), num_steps=1).job_id
    with sqlite3.connect(path) as db:
        db.execute(f"UPDATE jobs SET {change}")
    for ask in (queue.list, lambda: queue.get(job_id)):
        with pytest.raises(QueueDamaged, match="move the file away"):
            ask()
    queue.close()


def test_an_error_without_a_code_is_no_damage(path):
    """Python's own errors have none: here, of a closed file."""
    queue = JobQueue(path, 1000)
    queue.close()
    with pytest.raises(sqlite3.ProgrammingError):
        queue.list()


def test_a_newer_schema_is_refused_by_number(path):
    JobQueue(path, 10).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(QueueDamaged, match=f"schema version {SCHEMA_VERSION + 1}"):
        JobQueue(path, 10)


def test_a_failed_transaction_leaves_the_queue_usable(queue):
    with pytest.raises(NotFound):
        queue.add_notes("job-unknown", ["x"])
    assert submit(queue, request_of(), num_steps=1).state == "queued"


@pytest.mark.parametrize("body", [b"", b"\xc1 garbage", b"\x81" * 2000])
def test_a_plan_that_cannot_be_read_fails_its_job_only(queue, path, body):
    bad, good = submit(queue, request_of("bad")), submit(queue, request_of("good"))
    db = sqlite3.connect(path)
    db.execute("UPDATE plans SET body = ? WHERE seq = ?", (body, bad.seq))
    db.commit()
    db.close()
    assert queue.take().info.job_id == good.job_id
    assert (queue.get(bad.job_id).state, "send the job again" in queue.get(bad.job_id).error) == (
        "failed",
        True,
    )
