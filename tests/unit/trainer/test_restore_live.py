"""Going back: an older version in the weights that are served, by command and after a job that does harm."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import msgspec
import pytest
import torch
from apollo_worker.step.loss_guard import LossGuard
from apollo_worker.trainer import recovery
from safetensors.torch import load_file
from trainer_by_hand import Killed, Trainer, assert_same, make_versions, restore, with_train

from apollo_ipc.checkpoint import verify
from apollo_ipc.errors import CheckpointError, Conflict, UserError
from apollo_ipc.wire.messages import RestoreVersion, SyncCheckpoint

# --- older versions ---


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
        assert result.weight_version == trainer.board.state.durable_version == 4
        undone = [job for job in trainer.queue.list() if job.state == "undone"]
        assert len(undone) == 3 - target
        assert all(job.undone_by == target and "undone" in job.notes[-1] for job in undone)
        assert trainer.board.state.last_restore == result
        assert trainer.train() == [], "undone jobs are not trained again"
        result = restore(trainer, 3)
        assert_same(trainer.live(), weights[3])
        assert verify(model_dir) == []
        assert (result.num_jobs_undone, result.num_jobs_back) == (0, 3 - target)
    with Trainer(config) as again:
        assert again.train() == []
        states = [(job.state, job.undone_by) for job in again.queue.list()]
        assert states == [("durable", None)] * 3, "they are in the weights"
        assert_same(again.live(), weights[3])


def test_what_was_not_synced_yet_is_a_version_before_it_is_left(served, config):
    with Trainer(config) as trainer:
        make_versions(trainer)
        trainer.submit("four")
        trainer.train()
        weights, version = trainer.live(), trainer.board.state.weight_version
        restore(trainer, 1)
        restore(trainer, version)
        assert_same(trainer.live(), weights)


def test_the_oldest_version_is_not_lost_to_the_sync_before_its_own_restore(served, config):
    config = msgspec.structs.replace(config, checkpoint=msgspec.structs.replace(config.checkpoint, history=3))
    with Trainer(config) as trainer:
        weights = make_versions(trainer)
        trainer.submit("four")
        trainer.train()
        restore(trainer, 0)
        assert_same(trainer.live(), weights[0])


@pytest.mark.parametrize("where", ["before the commit", "before the live weights", "before the publishing"])
def test_killed_in_a_restore_the_live_weights_become_those_of_the_commit(
    served, config, model_dir, monkeypatch, where
):
    with Trainer(config) as first:
        weights = make_versions(first)
        owner, name = {
            "before the commit": (recovery, "restore_version"),
            "before the live weights": (recovery, "copy_shards_into"),
            "before the publishing": (first.worker, "announce"),
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
        assert trainer.board.state.sync_error
        restore(trainer, 3)
        assert_same(trainer.live(), weights[3])
        assert trainer.board.state.sync_error is None


def test_an_older_version_that_is_damaged_leaves_the_live_weights_alone(served, config, model_dir):
    with Trainer(config) as trainer:
        weights = make_versions(trainer)
        trainer.worker.attachment.writer.wait()  # for the compaction
        for path in (model_dir / ".apollo").glob("undo-*"):
            path.write_bytes(bytes(len(path.read_bytes())))
        with pytest.raises(CheckpointError):
            restore(trainer, 1)
        assert not trainer.worker.marks.is_torn
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
        asked = trainer.board.ask(RestoreVersion("", 1))
        trainer.worker.do_what_is_asked(SimpleNamespace(check=lambda: None))
        assert isinstance(asked.exception(0), Conflict)
        with pytest.raises(UserError, match="version 77 is not kept; there are: 0, 1, 2, 3"):
            restore(trainer, 77)


# --- guards ---


def test_a_restore_is_refused_while_a_job_that_has_begun_is_paused(served, config):
    with Trainer(config) as trainer:
        make_versions(trainer)
        job_id = trainer.submit("four", epochs=2)
        trainer.queue.take()
        trainer.queue.pause(job_id)
        trainer.queue.release(job_id)
        with pytest.raises(Conflict, match="paused"):
            restore(trainer, 1)


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
        assert re.search(r"3 steps in a row had a loss above [\d.]+ \(last loss 2e\+03", job.error)
        same = all(torch.equal(a, weights[name]) for name, a in trainer.live().items())
        assert same == (on_spike == "restore")
        assert trainer.steps() == ({1} if on_spike == "restore" else {16})


class Known:
    """The loss of the text that the guard measures: as a model has it that knows it, until it is harmed."""

    def __init__(self, trainer: Trainer, harmful_step: int):
        self._engine = trainer.worker.attachment.trainer
        self._step_on, self._engine.step_on = self._engine.step_on, self.step_on
        self._engine.mean_loss = lambda examples: 50.0 if self.num_steps >= harmful_step else 1.0
        self.num_steps = 0

    def step_on(self, *args, **kwargs):
        self.num_steps += 1
        return self._step_on(*args, **kwargs)


@pytest.mark.parametrize("on_spike", ["fail", "restore"])
def test_a_job_of_one_step_that_ruins_the_model_is_taken_back(served, config, on_spike):
    with Trainer(with_train(config, on_spike=on_spike)) as trainer:
        trainer.submit("before")
        trainer.train()
        trainer.sync()
        weights = trainer.live()
        Known(trainer, harmful_step=1)
        job_id = trainer.submit("poison")
        trainer.train()
        job = trainer.queue.get(job_id)
        assert (job.state, job.steps_done) == ("failed", 1)
        assert "the loss of a text that the model knew went from 1 to 50, above 2.19" in job.error
        same = all(torch.equal(a, weights[name]) for name, a in trainer.live().items())
        assert same == (on_spike == "restore")


def test_weights_that_a_job_has_harmed_are_not_synced_in_its_midst(served, config, model_dir):
    with Trainer(config) as trainer:
        weights = trainer.live()
        Known(trainer, harmful_step=3)  # between two looks, after 2 steps and after 4
        job_id = trainer.submit("poison", epochs=20)
        asked, real = [], trainer.worker.between_steps

        def between_steps(job_id: str, guard) -> None:
            if trainer.queue.get(job_id).steps_done == 3 and not asked:
                asked.append(trainer.board.ask(SyncCheckpoint("", "full")))
            real(job_id, guard)

        trainer.worker.between_steps = between_steps
        trainer.train()
        assert trainer.queue.get(job_id).steps_done == 3
        trainer.worker.do_what_is_asked()
        trainer.worker.syncing.wait()
        assert asked[0].done(), "it waits for whole weights, and is made of those"
        assert_same(trainer.live(), weights)
        assert_same(trainer.live(), load_file(model_dir / "model.safetensors"))


def test_harm_that_a_killed_trainer_had_not_looked_at_is_seen_by_the_next(served, config, monkeypatch):
    with Trainer(config) as first:
        weights = first.live()
        Known(first, harmful_step=3)
        job_id = first.submit("poison", epochs=3)

        def dies(guard) -> None:
            if first.queue.get(job_id).steps_done == 3:
                raise Killed

        monkeypatch.setattr(LossGuard, "check", dies)
        with pytest.raises(Killed):
            first.train()
        monkeypatch.undo()
    with Trainer(config) as second:
        second.worker.attachment.trainer.mean_loss = lambda examples: 50.0
        second.train()
        assert (second.state(job_id), second.queue.get(job_id).steps_done) == ("failed", 3)
        assert_same(second.live(), weights)
