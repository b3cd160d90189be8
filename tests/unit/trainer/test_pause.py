"""A job that is paused between two steps goes on as if nothing had been."""

from __future__ import annotations

import shutil

from served_model import Exporter, make_config
from trainer_by_hand import Trainer, assert_same


def pause_after(trainer: Trainer, job_id: str, step: int) -> None:
    engine, real = trainer.worker.attachment.trainer, trainer.worker.attachment.trainer.step_on
    done = iter(range(1, 1000))

    def step_on(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(done) == step:
            trainer.queue.pause(job_id)
        return result

    engine.step_on = step_on


def test_a_job_is_paused_between_two_steps_and_ends_as_if_it_had_not_been(
    served, config, tiny_model, tmp_path
):
    other = tmp_path / "other"
    other.mkdir()
    with (
        Exporter(shutil.copytree(tiny_model, other / "model"), make_config(other).runtime_dir),
        Trainer(make_config(other)) as trainer,
    ):
        job_id = trainer.submit("four", epochs=4)
        trainer.train()
        expected, losses = trainer.live(), trainer.queue.get(job_id, True).loss_history
    with Trainer(config) as trainer:
        job_id = trainer.submit("four", epochs=4)
        pause_after(trainer, job_id, 2)
        assert trainer.train() == [job_id]
        job = trainer.queue.get(job_id)
        assert (job.state, job.steps_done, trainer.queue.is_paused()) == ("running", 2, True)
        assert trainer.board.state.weight_version == 1, "what it has trained is served"
        assert trainer.train() == []
        trainer.queue.resume(job_id)
        assert trainer.train() == [job_id]
        assert trainer.queue.get(job_id, True).loss_history == losses
        assert any("the loss of example 0 is still" in note for note in trainer.queue.get(job_id).notes)
        assert_same(trainer.live(), expected)


def test_a_paused_job_stays_paused_through_the_end_of_the_trainer(served, config):
    with Trainer(config) as first:
        job_id = first.submit("four", epochs=4)
        pause_after(first, job_id, 2)
        first.train()
    with Trainer(config) as second:
        assert second.train() == []
        second.queue.resume(job_id)
        assert second.train() == [job_id]
        assert len(second.queue.get(job_id, True).loss_history) == 4
