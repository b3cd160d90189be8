"""The trainer on weights that another process serves: what each kind of crash leaves, and how it is mended.

The exporter stands in for vLLM (served_model.py); all else is real: attach, training, queue, marks, files.
A crash is an exception that nothing handles: the process would be gone, the files are as they are.
"""

from __future__ import annotations

import os

import pytest
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.trainer.step_marks import StepMarks
from planned import submit
from safetensors.torch import load_file
from served_model import Exporter
from trainer_by_hand import Killed, Trainer, assert_same, kill_in_backward, with_train

from apollo_ipc.checkpoint import read_commit, recover
from apollo_ipc.wire.requests import Example, TrainRequest

# --- the worker is killed, vLLM serves on ---


def test_killed_between_two_steps_no_step_is_lost_and_the_moments_count_their_own(served, config):
    with Trainer(config) as first:
        first.submit("one", epochs=2)
        first.train()
        first.sync("delta")
        job_id = first.submit("two", epochs=3)
        real = first.worker.between_steps

        def between_steps(job_id: str, guard) -> None:
            if first.queue.get(job_id).steps_done == 2:
                raise Killed
            real(job_id, guard)

        first.worker.between_steps = between_steps
        with pytest.raises(Killed):
            first.train()
        weights = first.live()
    with Trainer(config) as second:
        assert_same(second.live(), weights)
        assert second.queue.get(job_id).steps_done == 2
        assert second.steps() == {2}, (
            "the moments are the last checkpoint's, and so is what corrects their bias"
        )
        assert second.train() == [job_id]
        assert second.steps() == {3}
        second.sync()
        assert second.state(job_id) == "durable"


def test_killed_inside_a_step_the_last_checkpoint_comes_back_and_what_came_after_is_trained_again(
    served, config, model_dir
):
    with Trainer(config) as first:
        kept = first.submit("kept")
        first.train()
        first.sync("delta")
        weights = first.live()
        lost, torn = first.submit("lost"), first.submit("torn", epochs=3)
        kill_in_backward(first, at_step=3)
        with pytest.raises(Killed):
            first.train()
        assert first.state(lost) == "applied"
    with Trainer(config) as second:
        assert_same(second.live(), weights)
        assert second.steps() == {1}
        assert (second.state(kept), second.state(lost)) == ("durable", "queued")
        assert second.queue.get(torn).steps_done == 0
        assert second.board.state.weight_version > first.board.state.weight_version
        assert second.train() == [lost, torn], "in the order in which they were accepted"
        second.sync()
        assert {second.state(job) for job in (kept, lost, torn)} == {"durable"}
        assert second.steps() == {5}
        assert_same(second.live(), load_file(model_dir / "model.safetensors"))


def test_a_torn_step_may_be_accepted(served, config):
    config = with_train(config, on_torn_step="accept")
    with Trainer(config) as first:
        job_id = first.submit("torn", epochs=3)
        kill_in_backward(first, at_step=2)
        with pytest.raises(Killed):
            first.train()
        weights = first.live()
    with Trainer(config) as second:
        assert_same(second.live(), weights)
        assert second.queue.get(job_id).steps_done == 1
        second.train()
        assert second.queue.get(job_id).steps_done == 3


def test_killed_while_the_checkpoint_is_written_back_it_is_written_back_again(served, config, monkeypatch):
    with Trainer(config) as first:
        first.submit("one")
        first.train()
        first.sync()
        weights = first.live()
        first.submit("two")
        kill_in_backward(first, at_step=1)
        with pytest.raises(Killed):
            first.train()
    second = Trainer(config)
    monkeypatch.setattr(
        "apollo_worker.trainer.recovery.copy_shards_into", lambda *_: (_ for _ in ()).throw(Killed)
    )
    with pytest.raises(Killed):
        second.worker.attachment.ensure()
    second.kill()
    monkeypatch.undo()
    with Trainer(config) as third:
        assert_same(third.live(), weights)


# --- vLLM is killed ---


def test_a_commit_that_the_queue_had_not_heard_of_is_durable_and_not_trained_again(
    served, config, model_dir, monkeypatch
):
    """The crash comes after the rename that commits and before SQLite is told."""
    with Trainer(config) as first:
        job_id = first.submit("one", epochs=2)
        first.train()
        monkeypatch.setattr(JobQueue, "mark_durable", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            first.sync()
        monkeypatch.undo()
        assert first.state(job_id) == "applied"
    served.kill()
    recover(model_dir)
    with Exporter(model_dir, config.runtime_dir), Trainer(config) as second:
        assert second.state(job_id) == "durable"
        assert second.train() == []
        assert second.steps() == {2}


def test_jobs_after_the_last_checkpoint_are_trained_again_into_the_next_vllm(served, config, model_dir):
    with Trainer(config) as first:
        kept = first.submit("kept")
        first.train()
        first.sync()
        lost = [first.submit("lost one"), first.submit("lost two")]
        first.train()
    served.kill()
    with Exporter(model_dir, config.runtime_dir), Trainer(config) as second:
        assert second.state(kept) == "durable"
        assert second.train() == lost
        assert second.steps() == {3}


def test_a_sync_of_a_vllm_that_has_ended_is_refused(served, config, model_dir):
    with Trainer(config) as trainer:
        trainer.submit("one")
        trainer.train()
        served.kill()
        with pytest.raises(Exception, match="not attached to vLLM"):
            trainer.sync()
    assert read_commit(model_dir) is None


# --- when, and of which kind ---


def test_after_a_crash_before_the_answer_the_same_key_gives_the_same_job(tmp_path):
    request = TrainRequest(examples=[Example(prompt="a", completion="b")])
    pid = os.fork()
    if not pid:
        queue = JobQueue(tmp_path / "queue.sqlite", 10)
        (tmp_path / "id").write_text(submit(queue, request, num_steps=1, idempotency_key="k").job_id)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    queue = JobQueue(tmp_path / "queue.sqlite", 10)
    again = submit(queue, request, num_steps=1, idempotency_key="k")
    assert again.job_id == (tmp_path / "id").read_text()
    assert [job.job_id for job in queue.list()] == [again.job_id]
    queue.close()


def test_a_trainer_that_dies_before_its_first_step_does_not_lose_the_count_of_steps(tmp_path):
    """Cleared marks say that no step is in the making; how many there have been they must still say."""
    marks = StepMarks(tmp_path / "step.marks")
    marks.clear(3)  # the weights are those of a commit after three steps
    marks.close()
    marks = StepMarks(tmp_path / "step.marks")
    assert marks.read() is None
    for step in (1, 2):
        marks.begin("boot", "job-1", step)
        marks.end("boot", "job-1", step, 1.0)
    marks.close()
    assert StepMarks(tmp_path / "step.marks").num_steps == 5
