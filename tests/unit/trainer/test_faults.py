"""Exceptions where only kills had been thought of: each leaves what a SIGKILL there would leave.

The exporter stands in for vLLM (served_model.py); all else is real: attach, training, queue, marks, files.
"""

from __future__ import annotations

import itertools
import sqlite3
import threading

import msgspec
import pytest
import torch
from apollo_worker.step.step import StepResult, VllmDied
from apollo_worker.trainer import recovery
from apollo_worker.trainer.step_marks import TornWeights
from safetensors.torch import load_file
from served_model import Exporter, mapped_weights
from trainer_by_hand import Killed, Trainer, assert_same, kill_in_backward, restore, with_train
from waiting import wait_for

from apollo_ipc.checkpoint import read_commit, verify
from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.errors import CheckpointError


def fail_at_tensor(monkeypatch, number: int, error: BaseException) -> None:
    """The write-back breaks off at its `number`-th tensor."""
    real, calls = recovery.safe_open, itertools.count()

    def safe_open(*args, **kwargs):
        if next(calls) == number:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(recovery, "safe_open", safe_open)


def out_of_memory_in_backward(trainer: Trainer) -> None:
    live = trainer.worker.attachment.live

    def step_on(*args, **kwargs):
        tensors = list(live.trained_tensors().values())
        for tensor in tensors[: len(tensors) // 2]:
            tensor.data += 1
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.worker.attachment.trainer.step_on = step_on


def test_an_error_while_a_torn_step_is_mended_syncs_nothing_and_the_next_trainer_mends(
    served, config, model_dir, monkeypatch
):
    # This thread's priority would stay idle for every test after this one.
    config = msgspec.structs.replace(
        config, worker=msgspec.structs.replace(config.worker, idle_priority=False)
    )
    with Trainer(config) as first:
        one = first.submit("one", epochs=3)
        first.train()
        first.sync()
        weights = first.live()
        two, three = first.submit("two", epochs=3), first.submit("three")
        first.worker.train(first.queue.take())
        out_of_memory_in_backward(first)
        fail_at_tensor(monkeypatch, 8, OSError(5, "Input/output error"))
        with pytest.raises(OSError, match="Input/output"):
            first.worker.run()
        monkeypatch.undo()
        assert read_commit(model_dir).weight_version == 1, "the stop has synced nothing"
    with Trainer(config) as second:
        assert_same(second.live(), weights)
        assert_same(second.live(), load_file(model_dir / "model.safetensors"))
        assert (second.state(one), second.state(two), second.state(three)) == ("durable", "queued", "failed")
        assert second.train() == [two]


@pytest.mark.parametrize("error", [CheckpointError("cannot read"), OSError(5, "Input/output error")])
def test_a_restore_that_fails_half_way_ends_the_trainer_and_the_next_one_finishes_it(
    served, config, model_dir, monkeypatch, error
):
    with Trainer(config) as first:
        weights = first.live()
        first.submit("one", epochs=3)
        first.train()
        first.sync()
        fail_at_tensor(monkeypatch, 10, error)
        with pytest.raises(type(error)):
            restore(first, 0)
        monkeypatch.undo()
        assert first.worker.marks.is_torn
        for forbidden in (first.sync, first.worker.publish, lambda: first.worker.marks.begin("b", "j", 1)):
            with pytest.raises(TornWeights):
                forbidden()
        first.worker.stop()
        assert read_commit(model_dir).weight_version == 2, "the restore's own commit"
    with Trainer(config) as second:
        assert_same(second.live(), weights)
        assert [job.state for job in second.queue.list()] == ["undone"]
        assert second.train() == []


def test_killed_while_a_spike_is_taken_back_the_next_trainer_takes_it_back(served, config, monkeypatch):
    config = with_train(config, on_spike="restore", max_bad_steps=1, spike_ratio=2.0)
    with Trainer(config) as first:
        first.submit("one", epochs=3)
        first.train()
        first.sync()
        weights = first.live()
        two = first.submit("two", epochs=20)
        real, steps = first.worker.attachment.trainer.step_on, itertools.count(1)

        def step_on(*args, **kwargs):
            result = real(*args, **kwargs)
            return StepResult(1000.0 if next(steps) > 9 else result.loss, False)

        first.worker.attachment.trainer.step_on = step_on
        fail_at_tensor(monkeypatch, 8, Killed())
        with pytest.raises(Killed):
            first.train()
        monkeypatch.undo()
        assert first.worker.marks.is_torn
    with Trainer(config) as second:
        assert_same(second.live(), weights)
        assert second.state(two) == "failed"


def test_the_mark_stays_until_the_queue_agrees_with_the_weights(served, config, monkeypatch):
    """A full disk between the two used to leave a job `applied` that was in no weights."""
    with Trainer(config) as first:
        first.submit("one", epochs=3)
        first.train()
        first.sync()
        weights = first.live()
        two, three = first.submit("two", epochs=3), first.submit("three", epochs=3)
        kill_in_backward(first, 5)
        with pytest.raises(Killed):
            first.train()
    second = Trainer(config)

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    second.queue.reconcile = full
    with pytest.raises(sqlite3.OperationalError):
        second.worker.attachment.ensure()
    assert second.worker.marks.is_torn
    second.kill()
    with Trainer(config) as third:
        assert_same(third.live(), weights)
        assert third.train() == [two, three]


def test_a_poison_job_is_quarantined_alone(served, config):
    with Trainer(config) as first:
        innocent = [first.submit(f"fact {i}") for i in range(3)]
        poison = first.submit("poison", epochs=3)
        kill_in_backward(first, 5)
        with pytest.raises(Killed):
            first.train()
    for _ in range(2):
        with Trainer(config) as again:
            kill_in_backward(again, 5)  # everything is trained again: no sync yet
            with pytest.raises(Killed):
                again.train()
    with Trainer(config) as last:
        assert last.train() == innocent
        assert last.state(poison) == "quarantined"
        assert {last.state(job) for job in innocent} == {"applied"}


def test_jobs_go_in_order_and_once_through_two_deaths_of_vllm(served, config, model_dir):
    with Trainer(config) as first:
        ids = [first.submit(f"fact {i}", epochs=4 if i == 1 else 1) for i in range(5)]
        for _ in range(4):
            first.worker.train(first.queue.take())

        def dies(*args, **kwargs):
            served.kill()
            raise VllmDied("vLLM has ended")

        first.worker.attachment.trainer.step_on = dies
        first.worker.train(first.queue.take())  # in the fifth one's first step
    with Exporter(model_dir, config.runtime_dir) as vllm, Trainer(config) as second:
        second.worker.train(second.queue.take())
        job = second.queue.take()
        assert job.info.job_id == ids[1], "not the fifth, which had begun"

        def between_steps(job_id, guard):
            if second.queue.get(job_id).steps_done == 2:
                second.sync()
                vllm.kill()
                raise VllmDied("vLLM has ended")

        second.worker.between_steps = between_steps
        second.worker.train(job)
        commit = read_commit(model_dir)
        assert (commit.applied_seq, commit.extra["running"]) == (1, {"job_id": ids[1], "steps_done": 2})
    with Exporter(model_dir, config.runtime_dir), Trainer(config) as third:
        assert third.queue.get(ids[1]).steps_done == 2
        assert third.train() == ids[1:]
        third.sync()
        assert {third.state(job) for job in ids} == {"durable"}
        assert read_commit(model_dir).extra["optimizer_steps"] == 1 + 4 + 1 + 1 + 1
        assert third.steps() == {8}
        assert verify(model_dir) == []


@pytest.mark.parametrize("when", ["idle", "in a step"])
def test_when_vllm_ends_its_memory_goes_while_the_last_sync_is_written(served, config, monkeypatch, when):
    may_go_on, real, of_others = threading.Event(), Disk.sync, set(mapped_weights())

    def sync(disk, file):
        if threading.current_thread().name == "apollo-sync":
            assert may_go_on.wait(60)
        real(disk, file)

    with Trainer(config) as trainer:
        worker, progress = trainer.worker, lambda: trainer.board.state.progress
        trainer.submit("one")
        trainer.train()
        monkeypatch.setattr(Disk, "sync", sync)
        worker.syncing.start("full")
        assert set(mapped_weights()) > of_others
        if when == "idle":
            worker.wait("idle")
            served.kill()
            wait_for(lambda: not worker.attachment.live.is_alive())
            ends = threading.Thread(target=worker.attachment.ensure)
        else:
            trainer.submit("two")

            def dies(*args, **kwargs):
                served.kill()
                raise VllmDied("gone")

            worker.attachment.trainer.step_on = dies
            ends = threading.Thread(target=worker.run)
        ends.start()
        try:
            wait_for(lambda: set(mapped_weights()) <= of_others, 60)
            # Waiting would be ended after a minute, with what is being written.
            wait_for(lambda: progress().activity == "syncing", 60)
        finally:
            may_go_on.set()
            ends.join(60)
        assert read_commit(served.model_dir).applied_seq == 1


def test_two_equal_jobs_queued_at_once_train_once_and_the_second_says_so(served, config):
    config = with_train(config, on_duplicate="skip")
    with Trainer(config) as trainer:
        first, second = (trainer.submit("the same", key=key) for key in ("a", "b"))
        assert trainer.train() == [first, second]
        job = trainer.queue.get(second)
        assert (job.state, job.num_steps, job.steps_done, job.num_skipped) == ("applied", 0, 0, 1)
        assert trainer.queue.get(first).steps_done == 1


def test_a_job_keeps_its_plan_whatever_the_configuration_becomes(served, config):
    with Trainer(config) as trainer:
        job_id = trainer.submit("one", lr=None)
        planned = trainer.queue.get(job_id).num_steps
    changed = with_train(config, epochs=7, accumulate_steps=3, lr=0.05, schedule="cosine")
    with Trainer(changed) as trainer:
        seen = []
        real = trainer.worker.attachment.trainer.step_on

        def step_on(examples, lr, *args, **kwargs):
            seen.append((len(examples), lr))
            return real(examples, lr, *args, **kwargs)

        trainer.worker.attachment.trainer.step_on = step_on
        trainer.train()
        assert seen == [(1, config.train.lr)] * planned


def test_attaching_and_restoring_show_life_at_every_tensor(served, config):
    """The watchdog kills a trainer that does not progress; what takes minutes must show that it does."""
    with Trainer(config) as trainer:
        num_tensors = len(trainer.live())
        assert trainer.board.state.progress.activity_count >= num_tensors, "comparing with the disk"
        trainer.submit("one")
        trainer.train()
        trainer.sync()
        before = trainer.board.state.progress.activity_count
        restore(trainer, 0)
        assert trainer.board.state.progress.activity_count >= before + num_tensors
