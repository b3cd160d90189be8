"""Another machine's versions in this one's live weights: bit for bit, cheaply, and never half believed."""

from __future__ import annotations

import json
import shutil

import msgspec
import pytest
import torch
from apollo_worker.follow import version as version_module
from apollo_worker.follow.loop import FollowLoop
from apollo_worker.front.front import Front
from apollo_worker.front.trainer_process import FOLLOWER
from served_model import make_config, make_tiny_model
from trainer_by_hand import assert_same, restore
from two_machines import Machines

from apollo_ipc.checkpoint import read_commit, verify
from apollo_ipc.config import Follow
from apollo_ipc.errors import Conflict, UserError
from apollo_ipc.wire.messages import SyncCheckpoint
from apollo_ipc.wire.requests import Example, TrainRequest


def live(loop: FollowLoop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.live.trained_tensors().items()}


def assert_follows(machines: Machines, loop: FollowLoop) -> None:
    loop.look()
    assert loop.board.state.following.error is None
    assert_same(live(loop), machines.learner.live())


def test_each_version_is_followed_bit_for_bit_and_kept_on_disk(machines):
    loop = machines.follower()
    loop.look()
    assert loop.board.state.following.error == "nothing was synced there yet"
    for i, kind in enumerate(("full", "delta", "delta", "full", "delta")):
        machines.learn(f"fact {i}", kind)
        assert_follows(machines, loop)
        assert loop.board.state.following.weight_version == machines.learner.board.state.weight_version
        here = loop.live.model_dir
        assert read_commit(here).weight_version == loop.board.state.weight_version
        assert verify(here) == []
    loop.look()  # nothing new: nothing written
    assert loop.board.state.weight_version == read_commit(loop.live.model_dir).weight_version


def test_a_delta_moves_its_own_bytes_and_no_more(machines):
    machines.learn("one", "full")
    loop = machines.follower()
    assert_follows(machines, loop)
    for text in ("two", "three", "four"):
        before = loop.source.num_bytes
        machines.learn(text)
        assert_follows(machines, loop)
        delta = read_commit(machines.model_dir).delta
        most = sum(one.end - one.start for one in delta.tensors.values())
        assert 0.9 * most < loop.source.num_bytes - before <= most  # a small tensor costs less whole


def test_versions_that_were_missed_are_caught_up_with(machines):
    machines.learn("one", "full")
    loop = machines.follower()
    assert_follows(machines, loop)
    for i in range(6):  # more than the source's history holds, over two full syncs
        machines.learn(f"fact {i}", "full" if i in (1, 4) else "delta")
    assert_follows(machines, loop)


def test_a_restore_of_the_source_is_followed_and_has_a_version_of_its_own(machines):
    for i, kind in enumerate(("full", "delta", "delta")):
        machines.learn(f"fact {i}", kind)
    loop = machines.follower()
    assert_follows(machines, loop)
    before = loop.board.state.weight_version
    restore(machines.learner, 2)
    assert_follows(machines, loop)
    assert loop.board.state.weight_version > before


def test_a_pinned_version_stays_and_one_that_is_not_kept_is_named(machines):
    machines.learn("one", "full")
    wanted = machines.learner.live()
    number = machines.learner.board.state.weight_version
    machines.learn("two")
    loop = machines.follower(version=number)
    loop.look()
    assert_same(live(loop), wanted)
    machines.learn("three")
    loop.look()
    assert_same(live(loop), wanted)
    loop.detach("done")
    other = machines.follower(version=77)
    other.look()
    assert "version 77 is not kept; there are: 0," in other.board.state.following.error


def test_a_follower_that_was_killed_while_it_wrote_fetches_what_no_version_knows(machines, monkeypatch):
    machines.learn("one", "full")
    loop = machines.follower()
    assert_follows(machines, loop)
    machines.learn("two")
    real, calls = version_module.Follows._prove, []

    def dies(self, data, name, target):
        if loop._is_writing:
            calls.append(name)
            if len(calls) == 4:
                next(iter(self._live.values())).view(torch.int16).flatten()[:5] ^= 77  # torn
                raise KeyboardInterrupt
        real(self, data, name, target)

    monkeypatch.setattr(version_module.Follows, "_prove", dies)
    with pytest.raises(KeyboardInterrupt):
        loop.look()
    loop.detach("killed")
    monkeypatch.undo()
    again = machines.follower()
    assert_follows(machines, again)


@pytest.mark.parametrize("what", ["frames here", "frames there", "half a copy", "no record", "garbage"])
def test_damage_is_never_written_and_mended_when_the_source_is_whole(machines, what, tmp_path):
    machines.learn("one", "full")
    copy = tmp_path / "copied"  # as rsync would make it
    shutil.copytree(machines.model_dir, copy)
    loop = machines.follower(source=str(copy))
    loop.look()
    before = live(loop)
    machines.learn("two")
    shutil.copytree(machines.model_dir, copy, dirs_exist_ok=True)
    delta = copy / ".apollo" / read_commit(copy).delta.file.name
    if what == "frames here":
        loop.look()
        before = live(loop)
        machines.learn("three")
        shutil.copytree(machines.model_dir, copy, dirs_exist_ok=True)
        for frame in (loop.config.state_dir / "follow").iterdir():
            if frame.suffix != ".json":
                frame.write_bytes(b"x" + frame.read_bytes()[1:])
        loop.look()
        assert loop.board.state.following.error is not None
        assert_same(live(loop), before)
        assert_follows(machines, loop)
        return
    match what:
        case "frames there":
            delta.write_bytes(delta.read_bytes()[:-40] + bytes(40))
        case "half a copy":
            delta.unlink()
        case "no record":
            (copy / ".apollo/commit.json").unlink()
        case "garbage":
            (copy / ".apollo/commit.json").write_bytes(b"{")
    loop.look()
    assert loop.board.state.following.error is not None
    assert_same(live(loop), before)
    shutil.copytree(machines.model_dir, copy, dirs_exist_ok=True)
    assert_follows(machines, loop)


def test_another_model_and_another_dtype_are_refused_by_name(machines, tmp_path):
    loop = machines.follower()
    machines.learn("one", "full")
    commit = machines.model_dir / ".apollo/commit.json"
    record = json.loads(commit.read_bytes())
    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    (other / ".apollo").mkdir()
    for drop in ([], list(record["tensors"])[:1]):
        told = {k: v for k, v in record.items() if k != "seal"}
        told["tensors"] = {k: "0" * 32 for k in record["tensors"] if k not in drop}
        told["shards"], told["delta"], told["history"], told["undos"] = {}, None, [], []
        (other / ".apollo/commit.json").write_text(json.dumps(told))
        loop.source.url = str(other)
        loop.source.__dict__.pop("_files", None)
        loop.look()
        assert "another model" in (loop.board.state.following.error or "")


def test_what_is_asked_of_a_follower_is_refused(machines):
    loop = machines.follower()
    asked = loop.board.ask(SyncCheckpoint("", "full"))
    loop.refuse_asked()
    with pytest.raises(Conflict, match="ask the machine that trains"):
        asked.result(0)


def test_a_source_that_cannot_be_opened_says_so(machines):
    cases = {"nosuch://bucket/model": "cannot be opened", "/nowhere/model": "nothing was synced"}
    for source, words in cases.items():
        loop = machines.follower(source=source)
        loop.look()
        assert words in loop.board.state.following.error
        loop.detach("done")


def test_the_front_of_a_follower_starts_no_trainer_and_takes_no_job(tmp_path):
    config = make_config(tmp_path)
    front = Front(msgspec.structs.replace(config, follow=Follow(source="/mnt/model")))
    try:
        assert front.trainer._command == FOLLOWER
        with pytest.raises(UserError, match="follows /mnt/model and trains nothing itself") as refused:
            front.board.admit(TrainRequest(examples=[Example(prompt="a", completion="b")]))
        assert refused.value.code == "follows"
    finally:
        front.stop()
