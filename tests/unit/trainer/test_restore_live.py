"""Going back: an older version in the weights that are served, by command and after a job that does harm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from apollo_worker.trainer import recovery
from safetensors.torch import load_file
from trainer_by_hand import Killed, Trainer, assert_same, make_versions, restore, with_train

from apollo_ipc.checkpoint import verify
from apollo_ipc.errors import CheckpointError, Conflict, UserError
from apollo_ipc.wire.messages import RestoreVersion

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
        weights, version = trainer.live(), trainer.board.state.weight_version
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
