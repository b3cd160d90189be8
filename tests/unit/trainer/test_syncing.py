"""When the trainer syncs, and of which kind."""

from __future__ import annotations

import time

import pytest
from safetensors.torch import load_file
from trainer_by_hand import Trainer, assert_same, make_versions, restore

from apollo_ipc.checkpoint import read_commit, recover, verify
from apollo_ipc.errors import CheckpointError
from apollo_ipc.wire.messages import SyncCheckpoint


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

        def between_steps(job_id: str, guard) -> None:
            if trainer.queue.get(job_id).steps_done == 2 and not asked:
                asked.append(trainer.board.ask(SyncCheckpoint("", "delta")))
            real(job_id, guard)
            seen.append(trainer.live())

        trainer.worker.between_steps = between_steps
        trainer.train()
        trainer.worker.syncing.wait()
        result = asked[0].result(0)
        commit = read_commit(model_dir)
        assert (result.weight_version, commit.weight_version, trainer.board.state.weight_version) == (1, 1, 2)
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
        assert again.board.state.weight_version == again.board.state.durable_version == 4
    assert verify(model_dir) == []


def test_a_failed_sync_and_a_good_one_are_counted(served, config, monkeypatch):
    with Trainer(config) as trainer:
        trainer.submit("one", epochs=2)
        trainer.train()
        with monkeypatch.context() as patch:
            patch.setattr(trainer.worker.attachment.writer, "start", refuse)
            with pytest.raises(CheckpointError):
                trainer.sync()
        trainer.sync()
        tally = trainer.board.state.tally
    assert (tally.num_syncs, tally.num_sync_failures, tally.num_steps) == (1, 1, 2)
    assert tally.num_tokens > 2
    assert tally.sync_bytes > 0
    assert min(tally.step_s[phase] for phase in ("forward", "backward", "record", "publish")) > 0


def refuse(*_, **__):
    raise CheckpointError("the disk is full")
