"""Jobs of other losses through the trainer: killed, resumed, shown."""

from __future__ import annotations

import shutil

import pytest
from apollo_worker.jobs.example import request_digest
from apollo_worker.jobs.references import References
from served_model import Exporter, make_config
from trainer_by_hand import Killed, Trainer, assert_same, kill_in_backward

from apollo_ipc.wire.examples import Completion
from apollo_ipc.wire.messages import SyncCheckpoint
from apollo_ipc.wire.requests import Example, TrainOptions, TrainRequest

PAIRS = [Example(prompt=f"Port {i}: ", chosen=f"Ember {i}", rejected=f"Cole Harbour {i}") for i in range(3)]
GROUP = Example(
    prompt="Port: ",
    completions=[Completion(text=text, reward=reward) for text, reward in (("Ember", 1.0), ("no", 0.0))],
)


def submit(trainer: Trainer, examples: list[Example], **options) -> str:
    request = TrainRequest(examples, TrainOptions(lr=1e-3, **options))
    return trainer.queue.submit(trainer.plan(request), request_digest(request)).job_id


@pytest.fixture
def uninterrupted(tiny_model, tmp_path):
    """(weights, losses, reference) of the job that nothing happened to."""
    other = tmp_path / "other"
    other.mkdir()
    config = make_config(other)
    with (
        Exporter(shutil.copytree(tiny_model, other / "model"), config.runtime_dir),
        Trainer(config) as trainer,
    ):
        job_id = submit(trainer, PAIRS, epochs=2)
        trainer.train()
        losses = trainer.queue.get(job_id, True).loss_history
        assert losses[0] == pytest.approx(0.6931, abs=1e-3), "the first margin is 0"
        assert losses[-1] < losses[0]
        yield trainer.live(), losses, References(trainer.queue, job_id).known()


@pytest.mark.parametrize("is_synced", [True, False])
def test_a_killed_dpo_job_goes_on_against_the_same_reference(served, config, uninterrupted, is_synced):
    """With a sync in its middle it goes on from there; without one it begins anew on the old weights."""
    weights, losses, reference = uninterrupted
    with Trainer(config) as first:
        job_id = submit(first, PAIRS, epochs=2)
        kill_in_backward(first, at_step=4)
        engine, real = first.worker.attachment.trainer, first.worker.attachment.trainer.step_on
        steps = iter(range(1, 1000))

        def step_on(*args, **kwargs):
            if next(steps) == 3 and is_synced:  # so it is written before the fourth
                first.board.ask(SyncCheckpoint("", "full"))
            return real(*args, **kwargs)

        engine.step_on = step_on
        with pytest.raises(Killed):
            first.train()
        assert References(first.queue, job_id).known() == reference
    with Trainer(config) as second:
        steps_before = second.queue.get(job_id).steps_done
        assert steps_before == (3 if is_synced else 0)
        assert second.train() == [job_id]
        assert References(second.queue, job_id).known() == reference
        assert second.queue.get(job_id, True).loss_history == losses
        assert_same(second.live(), weights)


def test_a_reference_that_was_half_measured_is_measured_to_its_end(served, config):
    with Trainer(config) as first:
        job_id = submit(first, PAIRS)
        engine, real = first.worker.attachment.trainer, first.worker.attachment.trainer.logprobs_of
        calls = iter(range(1, 1000))

        def logprobs_of(*args, **kwargs):
            if next(calls) == 2:
                raise Killed
            return real(*args, **kwargs)

        engine.logprobs_of = logprobs_of
        with pytest.raises(Killed):
            first.train()
        assert sorted(References(first.queue, job_id).known()) == [0, 1]
    with Trainer(config) as second:
        assert second.train() == [job_id]
        assert sorted(References(second.queue, job_id).known()) == [0, 1, 2, 3, 4, 5]
        assert second.queue.get(job_id).state == "applied"


def test_a_group_shows_its_advantages_and_moves_towards_the_better_answer(served, config):
    with Trainer(config) as trainer:
        engine = trainer.worker.attachment.trainer
        sequences = trainer.plan(TrainRequest([GROUP])).examples
        before = [float(row.sum()) for row in engine.logprobs_of(sequences)]
        job_id = submit(trainer, [GROUP], epochs=3)
        assert trainer.train() == [job_id]
        job = trainer.queue.get(job_id, with_history=True)
        assert (job.loss, job.advantages, job.state) == ("grpo", [[0.5, -0.5]], "applied")
        assert trainer.queue.get(job_id).advantages is None
        after = [float(row.sum()) for row in engine.logprobs_of(sequences)]
        assert after[0] > before[0]
        assert after[1] < before[1]


def test_a_job_of_equal_rewards_is_applied_and_changes_nothing(served, config):
    flat = Example(prompt="Port: ", completions=["a", "b"], rewards=[1.0, 1.0])
    with Trainer(config) as trainer:
        before = trainer.live()
        job_id = submit(trainer, [flat])
        assert trainer.train() == [job_id]
        job = trainer.queue.get(job_id, with_history=True)
        assert (job.state, job.num_steps, job.advantages) == ("applied", 0, [[0.0, 0.0]])
        assert_same(trainer.live(), before)


def test_labels_move_answers_their_way(served, config):
    examples = [
        Example(prompt="Port: ", completion="Ember", label=True),
        Example(prompt="Bay: ", completion="Cole", label=False),
    ]
    with Trainer(config) as trainer:
        engine = trainer.worker.attachment.trainer
        sequences = trainer.plan(TrainRequest(examples)).examples
        before = engine.logprobs_of(sequences)
        job_id = submit(trainer, examples, epochs=4, accumulate_steps=2)
        trainer.train()
        job = trainer.queue.get(job_id, with_history=True)
        assert job.loss_history[0] == pytest.approx(0.5, abs=1e-3), "each half: sigmoid(0)"
        assert job.loss_history[-1] < job.loss_history[0]
        moved = [float((b - a).sum()) for a, b in zip(before, engine.logprobs_of(sequences), strict=True)]
        assert moved[0] > moved[2]
