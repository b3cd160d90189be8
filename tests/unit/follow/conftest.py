"""A learner that trains and syncs, and a follower's live weights beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from apollo_worker.follow.loop import FollowLoop
from served_model import Exporter, make_config, make_tiny_model
from trainer_by_hand import End, Trainer, with_train

from apollo_ipc.config import Config


class Machines(NamedTuple):
    learner: Trainer
    model_dir: Path  # the learner's
    config: Config  # the follower's
    served: Exporter  # the follower's

    def follower(self, **follow) -> FollowLoop:
        """A follower's process; `ensure` has attached it."""
        asked = msgspec.structs.replace(self.config.follow, **{"source": str(self.model_dir), **follow})
        loop = FollowLoop(End(msgspec.structs.replace(self.config, follow=asked)))
        assert loop.ensure(), loop.board.state.attach_error
        return loop

    def learn(self, text: str, kind: str = "delta") -> None:
        self.learner.submit(text)
        self.learner.train()
        self.learner.sync(kind)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    model_dir = make_tiny_model(tmp_path / "there/model")
    copy = shutil.copytree(model_dir, tmp_path / "here/model")
    there = with_train(make_config(tmp_path / "there"), spike_ratio=0.0)
    here = make_config(tmp_path / "here")
    with (
        Exporter(model_dir, there.runtime_dir),
        Exporter(copy, here.runtime_dir) as served,
        Trainer(there) as one,
    ):
        yield Machines(one, model_dir, here, served)
