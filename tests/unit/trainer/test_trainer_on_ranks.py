"""The trainer on a vLLM of two ranks: attaching, training, syncs, restores, and what kills one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from apollo_worker.model.compare import compare
from apollo_worker.model.live_model import attach
from apollo_worker.model.live_tensor import Part, Pieced, agrees, whole
from apollo_worker.step.step import VllmDied
from saved_model import stored
from served_model import mapped_weights
from sharded_model import RankProcesses
from trainer_by_hand import Killed, Trainer, assert_same, make_versions, restore, with_train

from apollo_ipc.checkpoint import recover
from apollo_ipc.config import Config
from apollo_ipc.manifest import Refusal, manifest_path, read_manifest, read_ranks, write_manifest


@pytest.fixture
def ranks(model_dir: Path, config: Config) -> Iterator[RankProcesses]:
    with RankProcesses(model_dir, config.runtime_dir) as served:
        yield served


def test_nothing_is_attached_before_the_last_rank_has_shared_its_weights(model_dir, config):
    served = RankProcesses(model_dir, config.runtime_dir)
    trainer = Trainer(config)
    try:
        served.start(0)
        assert not trainer.worker.attachment.ensure()
        assert "rank 1 has not shared its weights yet" in trainer.board.state.attach_error
        served.start(1)
        assert trainer.worker.attachment.ensure(), trainer.board.state.attach_error
        assert trainer.board.state.num_parameters_mapped == 24
        served.assert_serves(trainer.live())
    finally:
        trainer.kill()
        served.__exit__()


def test_the_manifest_that_another_vllm_left_is_not_mixed_with_this_one(ranks, config):
    second = read_manifest(config.runtime_dir, 1)
    write_manifest(msgspec.structs.replace(second, boot_id="0" * 32), config.runtime_dir)
    trainer = Trainer(config)
    assert not trainer.worker.attachment.ensure()
    assert "rank 1 has not shared" in trainer.board.state.attach_error
    trainer.kill()


def test_every_rank_serves_what_was_trained_and_the_directory_gets_it(ranks, config, model_dir):
    with Trainer(config) as trainer:
        before = trainer.live()
        job = trainer.submit("Port Ember.", epochs=3)
        trainer.train()
        assert trainer.state(job) == "applied"
        after = trainer.live()
        assert len([name for name in after if not torch.equal(after[name], before[name])]) == len(after)
        ranks.assert_serves(after)
        trainer.sync("delta")
        assert trainer.state(job) == "durable"
        assert_same(stored(model_dir), before)
        trainer.sync("full")
        assert_same(after, stored(model_dir))


def test_the_next_trainer_goes_on_where_this_one_was(ranks, config):
    before = {*mapped_weights()}
    with Trainer(config) as trainer:
        trainer.submit("Port Ember.")
        trainer.train()
        trained, moments = trainer.live(), trainer.steps()
        trainer.sync()
    with Trainer(config) as trainer:
        assert_same(trainer.live(), trained)
        assert trainer.steps() == moments == {1}
    assert not {*mapped_weights()} - before


def test_an_older_version_comes_back_into_every_rank(ranks, config):
    with Trainer(config) as trainer:
        versions = make_versions(trainer)
        for version in (2, 0):
            restore(trainer, version)
            assert_same(trainer.live(), versions[version])
            ranks.assert_serves(versions[version])


# --- killed in the middle ---


def killed_in_a_scatter(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The trainer ends when, in its scatter number `at`, one rank has the new values and no other."""
    scatters = iter(range(1, 100000))
    scatter = Pieced.scatter

    def half(self: Pieced, tensor: torch.Tensor) -> None:
        if next(scatters) < at or len(self.parts) < 2:
            return scatter(self, tensor)
        part = self.parts[0]
        part.live.copy_(part.of(tensor))
        raise Killed

    monkeypatch.setattr(Pieced, "scatter", half)


def synced_with_a_job_behind(config: Config, **options: Any) -> tuple[Trainer, dict[str, torch.Tensor], str]:
    """(attached, the weights that are on disk and served, a job that was not trained yet)."""
    trainer = Trainer(config)
    assert trainer.worker.attachment.ensure()
    trainer.submit("Port Ember.")
    trainer.train()
    trainer.sync()
    return trainer, trainer.live(), trainer.submit("Gooseberry.", **options)


@pytest.mark.parametrize("policy", ["restore", "accept"])
def test_a_half_scattered_tensor_is_a_torn_step(ranks, config, monkeypatch, policy):
    config = with_train(config, on_torn_step=policy)
    trainer, durable, job = synced_with_a_job_behind(config)
    with monkeypatch.context() as patch:
        killed_in_a_scatter(patch, at=9)
        with pytest.raises(Killed):
            trainer.train()
    assert trainer.worker.marks.is_torn
    torn = trainer.worker.attachment.require_live().trained_tensors()
    assert [name for name, tensor in torn.items() if not agrees(tensor, whole(tensor))] or any(
        not torch.equal(whole(tensor), durable[name]) for name, tensor in torn.items()
    )
    trainer.kill()
    with Trainer(config) as trainer:
        assert not trainer.worker.marks.is_torn
        live = trainer.worker.attachment.require_live().trained_tensors()
        assert all(agrees(tensor, whole(tensor)) for tensor in live.values())
        if policy == "restore":
            assert_same(trainer.live(), durable)
            ranks.assert_serves(durable)
        trainer.train()
        assert trainer.state(job) == "applied"
        ranks.assert_serves(trainer.live())


def test_a_restore_that_is_killed_in_a_scatter_is_done_again(ranks, config, monkeypatch):
    trainer = Trainer(config)
    assert trainer.worker.attachment.ensure()
    versions = make_versions(trainer)
    with monkeypatch.context() as patch:
        killed_in_a_scatter(patch, at=9)
        with pytest.raises(Killed):
            trainer.worker.attachment.restore_version(1)
    trainer.kill()
    with Trainer(config) as trainer:
        assert_same(trainer.live(), versions[1])
        ranks.assert_serves(versions[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_one_rank_stops_the_step_and_the_next_vllm_goes_on(ranks, config, model_dir, rank):
    trainer, durable, job = synced_with_a_job_behind(config, epochs=2)
    engine = trainer.worker.attachment.trainer
    step_on = engine.step_on

    def dies(*args, **kwargs):
        ranks.kill(rank)
        return step_on(*args, **kwargs)

    engine.step_on = dies
    trainer.worker.train(trainer.queue.take())
    assert trainer.worker.board.stopping.is_set()  # a fresh process goes on
    assert trainer.state(job) == "running"
    assert not trainer.worker.attachment.ensure()
    trainer.kill()
    ranks.__exit__()  # the others end with it
    recover(model_dir)
    manifest_path(config.runtime_dir, rank).unlink()
    with RankProcesses(model_dir, config.runtime_dir) as again, Trainer(config) as trainer:
        assert_same(trainer.live(), durable)
        trainer.train()
        assert trainer.state(job) == "applied"
        again.assert_serves(trainer.live())


def test_a_dead_rank_is_noticed_before_anything_is_written(ranks, config):
    with Trainer(config) as trainer:
        before = trainer.live()
        ranks.kill(1)
        with pytest.raises(VllmDied):
            trainer.worker.attachment.trainer.logprobs([1, 2, 3])
        assert_same(trainer.live(), before)


# --- manifests that cannot be ---


def change(config: Config, rank: int, **changes) -> None:
    manifest = read_manifest(config.runtime_dir, rank)
    write_manifest(msgspec.structs.replace(manifest, **changes), config.runtime_dir)


def refusal(config: Config) -> str:
    before = {*mapped_weights()}
    trainer = Trainer(config)
    assert not trainer.worker.attachment.ensure()
    found = trainer.board.state.attach_error
    trainer.kill()
    assert not {*mapped_weights()} - before
    return found


NORM = "model.norm.weight"


def test_a_tensor_of_which_a_part_is_nowhere_is_refused(ranks, config):
    name = "model.layers.0.mlp.down_proj.weight"
    pieces = read_manifest(config.runtime_dir, 1).pieces
    change(config, 1, pieces={other: held for other, held in pieces.items() if other != name})
    assert f"{name}: vLLM's 2 ranks together hold only a part of it" in refusal(config)


def test_a_tensor_that_one_rank_refuses_is_refused(ranks, config):
    change(config, 1, refused=[Refusal(NORM, "vLLM loads a changed copy of it", blocks=False)])
    assert f"{NORM}: vLLM loads a changed copy of it" in refusal(config)


@pytest.mark.parametrize("way", ["outside", "shape", "memory", "dtype"])
def test_pieces_that_contradict_each_other_are_refused(ranks, config, way):
    manifest = read_manifest(config.runtime_dir, 1)
    held, tensors = manifest.pieces[NORM], dict(manifest.tensors)
    (piece,) = held.pieces
    if way == "outside":
        held = msgspec.structs.replace(held, pieces=[msgspec.structs.replace(piece, start=[1])])
    elif way == "shape":
        held = msgspec.structs.replace(held, shape=[held.shape[0] + 1])
    elif way == "memory":
        held = msgspec.structs.replace(held, pieces=[msgspec.structs.replace(piece, offset=1)])
    else:
        half = msgspec.structs.replace(tensors[piece.tensor], dtype="float16")
        tensors[piece.tensor] = half
    change(config, 1, pieces={**manifest.pieces, NORM: held}, tensors=tensors)
    expected = {
        "outside": "lies outside of it",
        "shape": "two shapes",
        "memory": "reaches outside",
        "dtype": "two dtypes",
    }
    found = refusal(config)
    assert NORM in found
    assert expected[way] in found


def test_a_replica_that_differs_from_the_others_is_not_equal_to_the_checkpoint(ranks, config):
    live = attach(*read_ranks(config.runtime_dir), verify=True)
    norm = live.trained_tensors()[NORM]
    assert isinstance(norm.parts[1], Part)
    norm.parts[1].live[3] += 1
    assert compare(live.model_dir, live.trained_tensors()).different == [NORM]
    del norm
    live.close()
