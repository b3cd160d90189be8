"""The trainer on weights that another process serves: what each kind of crash leaves, and how it is mended.

The exporter stands in for vLLM (served_model.py); all else is real: attach, training, queue, marks, files.
A crash is an exception that nothing handles: the process would be gone, the files are as they are.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest
import torch
from apollo_worker import worker as worker_module
from apollo_worker.marks import StepMarks
from apollo_worker.queue import JobQueue
from apollo_worker.shared import Shared
from apollo_worker.worker import TrainingWorker
from safetensors.torch import load_file
from served_model import Exporter, make_config, make_tiny_model

from apollo_ipc.checkpoint import read_commit, recover, verify
from apollo_ipc.config import Config
from apollo_ipc.errors import CheckpointError, Conflict, UserError
from apollo_ipc.messages import RestoreVersion, SyncCheckpoint
from apollo_ipc.requests import Example, TrainOptions, TrainRequest


class Killed(BaseException):
    """Where it is raised the process would have ended."""


class End:
    """The trainer's end of the link, without a front."""

    has_front = True

    def __init__(self, config: Config):
        self.config, self.shared = config, Shared()

    def on_change(self, job) -> None:
        pass

    def tell_model(self, facts) -> None:
        pass

    def publish(self, version: int) -> bool:
        return True


class Trainer:
    """A trainer process's main loop, turned by hand. `kill` leaves everything as a SIGKILL would."""

    def __init__(self, config: Config):
        self.config = config
        self.worker = TrainingWorker(End(config))
        self.shared, self.queue = self.worker.shared, self.worker.queue

    def __enter__(self) -> Trainer:
        assert self.worker.attachment.ensure(), self.shared.attach_error
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        if (writer := self.worker.attachment.writer) is not None:
            writer.wait()
        self.worker.attachment.detach("killed")
        self.queue.close()
        self.worker.marks.close()

    def submit(self, text: str, **options) -> str:
        request = TrainRequest(
            examples=[Example(prompt="The harbour is called", completion=text)],
            options=TrainOptions(lr=1e-3, **options),
        )
        steps = options.get("epochs", 1)
        return self.queue.submit(request, num_steps=steps, idempotency_key=f"{text} {steps}").job_id

    def train(self) -> list[str]:
        """Every job that waits."""
        done = []
        while (job := self.queue.take()) is not None:
            self.worker.train(job)
            done.append(job.info.job_id)
        return done

    def sync(self, kind: str = "full") -> None:
        self.worker.syncing.start(kind)
        self.worker.syncing.wait()

    def live(self) -> dict[str, torch.Tensor]:
        return {name: t.clone() for name, t in self.worker.attachment.live.trained_tensors().items()}

    def steps(self) -> set[int]:
        """Of every parameter's optimizer state."""
        tensors = self.worker.attachment.trainer.main_optimizer.state_tensors()
        return {int(value) for key, value in tensors.items() if key.endswith(".step")}

    def state(self, job_id: str) -> str:
        return self.queue.get(job_id).state


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model_dir(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "model"))


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(tmp_path)


@pytest.fixture
def served(model_dir, config):
    with Exporter(model_dir, config.runtime_dir) as exporter:
        yield exporter


def with_train(config: Config, **changes) -> Config:
    return msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, **changes))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert [name for name in a if not torch.equal(a[name], b[name].to(a[name].dtype))] == []


def kill_in_backward(trainer: Trainer, at_step: int) -> None:
    """The process ends in the middle of that step: some tensors are written, some are not."""
    engine, real = trainer.worker.attachment.trainer, trainer.worker.attachment.trainer.step_on
    steps = iter(range(1, 1000))

    def step_on(*args, **kwargs):
        if next(steps) < at_step:
            return real(*args, **kwargs)
        next(iter(trainer.worker.attachment.live.trained_tensors().values()))[0] += 1
        raise Killed

    engine.step_on = step_on


# --- the worker is killed, vLLM serves on ---


def test_killed_between_two_steps_nothing_is_lost_and_the_optimizer_counts_on(served, config):
    with Trainer(config) as first:
        first.submit("one", epochs=2)
        first.train()
        first.sync("delta")
        job_id = first.submit("two", epochs=3)
        real = first.worker.between_steps

        def between_steps(job_id: str) -> None:
            if first.queue.get(job_id).steps_done == 2:
                raise Killed
            real(job_id)

        first.worker.between_steps = between_steps
        with pytest.raises(Killed):
            first.train()
        weights = first.live()
    with Trainer(config) as second:
        assert_same(second.live(), weights)
        assert second.queue.get(job_id).steps_done == 2
        assert second.steps() == {4}, "two of the first job, two of this one"
        assert second.train() == [job_id]
        assert second.steps() == {5}
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
        assert second.shared.weight_version > first.shared.weight_version
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
    monkeypatch.setattr("apollo_worker.attachment.restore", lambda live: (_ for _ in ()).throw(Killed))
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


# --- older versions ---


def make_versions(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    """Versions 0 to 3: as loaded, a full sync, a delta, a full one."""
    weights = [trainer.live()]
    for text, kind in (("one", "full"), ("two", "delta"), ("three", "full")):
        trainer.submit(text)
        trainer.train()
        trainer.sync(kind)
        weights.append(trainer.live())
    return weights


def restore(trainer: Trainer, version: int):
    asked = trainer.shared.ask(RestoreVersion("", version))
    trainer.worker.do_what_is_asked(is_training=False)
    return asked.result(0)


@pytest.mark.parametrize("target", [0, 1, 2])
def test_a_version_is_restored_live_with_its_optimizer_and_can_be_left_again(
    served, config, model_dir, target
):
    with Trainer(config) as trainer:
        weights = make_versions(trainer)
        result = restore(trainer, target)
        assert_same(trainer.live(), weights[target])
        assert_same(trainer.live(), load_file(model_dir / "model.safetensors"))
        assert trainer.steps() == {target}
        assert (result.num_jobs_undone, result.has_optimizer) == (3 - target, target > 0)
        assert result.weight_version == trainer.shared.durable_version == 4
        notes = [job.notes for job in trainer.queue.list()]
        assert sum(any("undone" in note for note in some) for some in notes) == 3 - target
        assert trainer.train() == [], "undone jobs are not trained again"
        restore(trainer, 3)
        assert_same(trainer.live(), weights[3])
        assert verify(model_dir) == []
    with Trainer(config) as again:
        assert again.train() == []
        assert_same(again.live(), weights[3])


def test_what_was_not_synced_yet_is_a_version_before_it_is_left(served, config):
    with Trainer(config) as trainer:
        make_versions(trainer)
        trainer.submit("four")
        trainer.train()
        weights, version = trainer.live(), trainer.shared.weight_version
        restore(trainer, 1)
        restore(trainer, version)
        assert_same(trainer.live(), weights)


@pytest.mark.parametrize("where", ["before the commit", "before the live weights", "before the publishing"])
def test_killed_in_a_restore_the_live_weights_become_those_of_the_commit(
    served, config, model_dir, monkeypatch, where
):
    with Trainer(config) as first:
        weights = make_versions(first)
        owner, name = {
            "before the commit": (worker_module, "restore_version"),
            "before the live weights": (first.worker.attachment, "restore_last_commit"),
            "before the publishing": (first.worker, "publish"),
        }[where]
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            restore(first, 1)
        monkeypatch.undo()
    with Trainer(config) as second:
        expected = weights[3 if where == "before the commit" else 1]
        assert_same(second.live(), expected)
        assert second.train() == []
        second.sync()
        assert_same(second.live(), load_file(model_dir / "model.safetensors"))
        assert verify(model_dir) == []


def test_weights_that_no_sync_takes_are_replaced_by_a_restore(served, config):
    with Trainer(config) as trainer:
        weights = make_versions(trainer)
        trainer.submit("four")
        trainer.train()
        next(iter(trainer.worker.attachment.live.trained_tensors().values()))[0, 0] = float("nan")
        with pytest.raises(CheckpointError, match="restore VERSION --live"):
            trainer.sync()
        assert trainer.shared.sync_error
        restore(trainer, 3)
        assert_same(trainer.live(), weights[3])
        assert trainer.shared.sync_error is None


def test_an_older_version_that_is_damaged_leaves_the_live_weights_alone(served, config, model_dir):
    with Trainer(config) as trainer:
        weights = make_versions(trainer)
        trainer.worker.attachment.writer.wait()  # for the compaction
        for path in (model_dir / ".apollo").glob("undo-*"):
            path.write_bytes(bytes(len(path.read_bytes())))
        with pytest.raises(CheckpointError):
            restore(trainer, 1)
        assert not trainer.worker.marks.read().is_torn
        assert_same(trainer.live(), weights[3])
        job_id = trainer.submit("four")
        assert trainer.train() == [job_id]
        trainer.sync()
        assert trainer.steps() == {4}


def test_a_restore_is_refused_while_a_job_trains_and_for_an_unknown_version(served, config):
    with Trainer(config) as trainer:
        with pytest.raises(UserError, match="nothing was synced yet"):
            restore(trainer, 1)
        make_versions(trainer)
        asked = trainer.shared.ask(RestoreVersion("", 1))
        trainer.worker.do_what_is_asked(is_training=True)
        assert isinstance(asked.exception(0), Conflict)
        with pytest.raises(UserError, match="version 77 is not kept; there are: 0, 1, 2, 3"):
            restore(trainer, 77)


# --- guards ---


@pytest.mark.parametrize("on_spike", ["fail", "restore"])
def test_a_job_whose_loss_runs_away_fails_and_the_weights_may_go_back(served, config, monkeypatch, on_spike):
    config = with_train(config, on_spike=on_spike)
    with Trainer(config) as trainer:
        trainer.submit("before")
        trainer.train()
        trainer.sync()
        weights = trainer.live()
        real = trainer.worker.attachment.trainer.step_on
        losses = iter([2.0] * 12 + [2000.0] * 3 + [2.0] * 100)

        def step_on(*args, **kwargs):
            return dataclasses.replace(real(*args, **kwargs), loss=next(losses))

        monkeypatch.setattr(trainer.worker.attachment.trainer, "step_on", step_on)
        job_id = trainer.submit("poison", epochs=40)
        trainer.train()
        job = trainer.queue.get(job_id)
        assert job.state == "failed"
        assert (
            "3 steps in a row had a loss above 10 (last loss 2e+03, median of the last 12 steps 2)"
            in job.error
        )
        same = all(torch.equal(a, weights[name]) for name, a in trainer.live().items())
        assert same == (on_spike == "restore")
        assert trainer.steps() == ({1} if on_spike == "restore" else {16})


# --- when, and of which kind ---


def test_syncs_are_deltas_until_a_full_one_is_due(served, config, monkeypatch):
    with Trainer(config) as trainer:
        syncing = trainer.worker.syncing
        assert not syncing.is_wanted(True)
        assert syncing.kind() == "delta"
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + config.checkpoint.sync_interval_s + 1)
        assert syncing.is_wanted(True)
        assert not syncing.is_wanted(False), "nothing has changed"
        assert syncing.kind() == "delta"
        monkeypatch.setattr(time, "monotonic", lambda: now + config.checkpoint.full_interval_s + 1)
        assert syncing.kind() == "full"
        monkeypatch.undo()
        syncing.note_job_done(config.checkpoint.bulk_job_steps - 1)
        assert not syncing.is_wanted(True)
        syncing.note_job_done(config.checkpoint.bulk_job_steps)
        assert syncing.is_wanted(False)
        assert syncing.kind() == "full"


def test_a_sync_inside_a_job_is_a_version_of_its_own_and_training_goes_on(served, config, model_dir):
    with Trainer(config) as trainer:
        trainer.submit("one", epochs=4)
        asked, seen = [], []
        real = trainer.worker.between_steps

        def between_steps(job_id: str) -> None:
            if trainer.queue.get(job_id).steps_done == 2 and not asked:
                asked.append(trainer.shared.ask(SyncCheckpoint("", "delta")))
            real(job_id)
            seen.append(trainer.live())

        trainer.worker.between_steps = between_steps
        trainer.train()
        trainer.worker.syncing.wait()
        result = asked[0].result(0)
        commit = read_commit(model_dir)
        assert (result.weight_version, commit.weight_version, trainer.shared.weight_version) == (1, 1, 2)
        assert commit.extra["running"]["steps_done"] == commit.extra["optimizer_steps"] == 2
        recover(model_dir)
        assert_same(seen[2], load_file(model_dir / "model.safetensors"))


def test_a_clock_that_jumps_back_changes_nothing(served, config, model_dir, monkeypatch):
    times = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    monkeypatch.setattr(time, "time_ns", lambda: next(times) * 10**9)
    with Trainer(config) as trainer:
        make_versions(trainer)
        assert [job.seq for job in trainer.queue.list()] == [3, 2, 1]
        assert {job.state for job in trainer.queue.list()} == {"durable"}
        restore(trainer, 2)
    with Trainer(config) as again:
        assert again.train() == []
        assert again.shared.weight_version == again.shared.durable_version == 4
    assert verify(model_dir) == []


def test_after_a_crash_before_the_answer_the_same_key_gives_the_same_job(tmp_path):
    request = TrainRequest(examples=[Example(prompt="a", completion="b")])
    pid = os.fork()
    if not pid:
        queue = JobQueue(tmp_path / "queue.sqlite", 10)
        (tmp_path / "id").write_text(queue.submit(request, num_steps=1, idempotency_key="k").job_id)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    queue = JobQueue(tmp_path / "queue.sqlite", 10)
    again = queue.submit(request, num_steps=1, idempotency_key="k")
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
