"""A follower whose vLLM has two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

from apollo_worker.model.live_tensor import whole
from saved_model import stored
from served_model import Exporter, make_config, make_tiny_model
from sharded_model import RankProcesses
from trainer_by_hand import Trainer, assert_same, with_train
from two_machines import Machines

from apollo_ipc.checkpoint import recover


def test_what_one_process_learns_two_ranks_follow(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    model_dir = make_tiny_model(tmp_path / "there/model")
    copy = Path(shutil.copytree(model_dir, tmp_path / "here/model"))
    there = with_train(make_config(tmp_path / "there"), spike_ratio=0.0)
    here = make_config(tmp_path / "here")
    with (
        Exporter(model_dir, there.runtime_dir),
        RankProcesses(copy, here.runtime_dir) as ranks,
        Trainer(there) as learner,
    ):
        machines = Machines(learner, model_dir, here, ranks)
        loop = machines.follower()
        for text, kind in (("one", "full"), ("two", "delta")):
            machines.learn(text, kind)
            loop.look()
            assert loop.board.state.following.error is None
            live = {name: whole(tensor).clone() for name, tensor in loop.live.trained_tensors().items()}
            assert_same(live, learner.live())
            ranks.assert_serves(live)
        loop.detach("the test is over")
        recover(copy)
        assert_same(live, stored(copy))
