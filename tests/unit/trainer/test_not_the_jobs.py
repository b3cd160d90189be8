"""An exception in the loop ends the job where its own step raised it, else the trainer, as a kill would.

The exporter stands in for vLLM (served_model.py); all else is real: attach, training, queue, marks, files.
"""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager

import msgspec
import pytest
from apollo_worker.jobs.queue import MAX_CRASHES, JobQueue
from apollo_worker.step.loss_guard import LossGuard
from apollo_worker.trainer import recovery
from trainer_by_hand import Trainer, restore

from apollo_ipc.checkpoint import read_commit
from apollo_ipc.errors import CheckpointError, NotReady

FULL = sqlite3.OperationalError("database or disk is full")


@pytest.fixture
def config(config):
    # This thread's priority would stay idle for every test after this one.
    return msgspec.structs.replace(config, worker=msgspec.structs.replace(config.worker, idle_priority=False))


def fails_once(function, error, *, is_done=False):
    """Raises the first time that it is called, with is_done after its work."""
    errors = [error]

    def call(*args, **kwargs):
        if not errors:
            return function(*args, **kwargs)
        if is_done:
            function(*args, **kwargs)
        raise errors.pop()

    return call


@contextmanager
def counted_steps(trainer: Trainer, counts: list[int]):
    engine = trainer.worker.attachment.trainer
    real = engine.step_on

    def step_on(*args, **kwargs):
        counts.append(1)
        return real(*args, **kwargs)

    engine.step_on = step_on
    yield
    engine.step_on = real


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after its commit"])
@pytest.mark.parametrize("what", ["record_step", "finish", "set_version", "forget_plans", "mark_durable"])
def test_an_error_outside_of_a_step_ends_the_trainer_and_the_job_goes_on(
    served, config, monkeypatch, what, is_done
):
    counts = []
    with Trainer(config) as first:
        one = first.submit("one", epochs=3)
        worker = first.worker
        worker.wait = lambda activity: first.board.stopping.set()  # once there is nothing to do
        owner = worker.attachment.recovery if what == "set_version" else first.queue
        error = OSError(28, "No space left on device") if what == "set_version" else FULL
        with counted_steps(first, counts):
            if what == "mark_durable":
                first.train()
                first.worker.syncing.start("full")
            monkeypatch.setattr(owner, what, fails_once(getattr(owner, what), error, is_done=is_done))
            with pytest.raises(type(error)):
                worker.run()
    if what != "mark_durable":
        assert read_commit(served.model_dir) is None, "nothing is synced on the way out"
    with Trainer(config) as second, counted_steps(second, counts):
        second.train()
        job = second.queue.get(one)
        assert (job.state, job.steps_done) == ("durable" if what == "mark_durable" else "applied", 3)
        with second.queue.reading() as db:
            assert db.execute("SELECT attempts FROM jobs").fetchone()[0] == 0, "not the job's fault"
    assert len(counts) == 3, "each step once"


def test_no_number_of_such_ends_quarantines_the_job(served, config, monkeypatch):
    with Trainer(config) as trainer:
        job_id = trainer.submit("one", epochs=2)
    for _ in range(3):
        with Trainer(config) as trainer:
            monkeypatch.setattr(trainer.queue, "finish", fails_once(None, FULL))
            with pytest.raises(sqlite3.OperationalError):
                trainer.train()
    for _ in range(4):  # killed where only the end is left
        queue = JobQueue(config.state_dir / "queue.sqlite", 1)
        assert queue.take().info.steps_done == 2
        queue.close()
    with Trainer(config) as trainer:
        assert trainer.train() == [job_id]
        assert trainer.state(job_id) == "applied"


def test_no_number_of_ends_before_its_first_step_quarantines_the_job(served, config, monkeypatch):
    """A step that is recorded would have cleared the count of attempts; here none is."""
    with Trainer(config) as trainer:
        job_id = trainer.submit("one")
    for _ in range(MAX_CRASHES + 1):
        with Trainer(config) as trainer:
            monkeypatch.setattr(trainer.queue, "add_notes", fails_once(None, FULL))
            with pytest.raises(sqlite3.OperationalError):
                trainer.train()
    with Trainer(config) as trainer:
        assert trainer.train() == [job_id]
        assert trainer.state(job_id) == "applied"


@pytest.mark.parametrize("error", [RuntimeError("a bad example"), MemoryError(), OSError(5, "I/O error")])
def test_what_the_step_itself_raises_ends_its_job_only(served, config, monkeypatch, error):
    with Trainer(config) as trainer:
        one, two = trainer.submit("one"), trainer.submit("two")
        engine = trainer.worker.attachment.trainer
        monkeypatch.setattr(engine, "step_on", fails_once(engine.step_on, error))
        assert trainer.train() == [one, two]
        assert (trainer.state(one), trainer.state(two)) == ("failed", "applied")
        failed = trainer.queue.get(one)
        assert type(error).__name__ in failed.error
        with trainer.queue.reading() as db:
            trace = db.execute("SELECT traceback FROM jobs WHERE job_id = ?", (one,)).fetchone()[0]
        assert "StepFailed" not in trace


def test_what_the_guard_raises_ends_its_job_only(served, config, monkeypatch):
    with Trainer(config) as trainer:
        one, two = trainer.submit("one"), trainer.submit("two")
        look = LossGuard.look
        monkeypatch.setattr(LossGuard, "look", fails_once(look, RuntimeError("out of memory")))
        assert trainer.train() == [one, two]
        assert (trainer.state(one), trainer.state(two)) == ("failed", "applied")


def test_a_busy_queue_in_a_cancel_ends_the_trainer_and_the_next_one_cancels(served, config, monkeypatch):
    with Trainer(config) as first:
        one = first.submit("one", epochs=50)
        job = first.queue.take()
        first.queue.cancel(one)
        monkeypatch.setattr(first.queue, "finish", fails_once(None, NotReady("busy", code="busy")))
        with pytest.raises(NotReady):
            first.worker.train(job)
    with Trainer(config) as second:
        second.train()
        assert second.state(one) == "cancelled"


def test_an_error_after_the_write_back_of_a_restore_ends_the_trainer(served, config, monkeypatch):
    """It has new weights and the old trainer's moments, whose hooks are gone: nothing may train on that."""
    with Trainer(config) as first:
        first.submit("one", epochs=3)
        first.train()
        first.sync()
        attached = first.worker.attachment
        monkeypatch.setattr(
            attached, "_renew_trainer", fails_once(None, CheckpointError("the record cannot be read"))
        )
        with pytest.raises(CheckpointError):
            restore(first, 0)
        assert not first.worker.marks.is_torn
    with Trainer(config) as second:
        assert second.steps() <= {0}
        assert [job.state for job in second.queue.list()] == ["undone"]


def test_a_restore_of_an_unknown_version_is_refused_and_the_trainer_goes_on(served, config):
    with Trainer(config) as trainer:
        trainer.submit("one")
        trainer.train()
        trainer.sync()
        with pytest.raises(Exception, match="7"):
            restore(trainer, 7)
        two = trainer.submit("two")
        assert trainer.train() == [two]


def test_an_error_while_the_mark_is_ended_trains_no_step_twice(served, config, monkeypatch):
    """state.json on a full disk, in a recovery: the same recovery is done by the next trainer."""
    with Trainer(config) as first:
        first.submit("one", epochs=2)
        first.train()
        first.sync()
    full = fails_once(recovery.write_state, OSError(28, "No space left on device"))
    monkeypatch.setattr(recovery, "write_state", full)
    second = Trainer(config)
    second.worker.wait = lambda activity: second.board.stopping.set()
    with pytest.raises(OSError, match="No space"):
        second.worker.run()
    second.kill()
    with Trainer(config) as third:
        assert third.train() == []
        assert third.steps() == {2}
