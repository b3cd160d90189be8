"""A learner that trains and syncs, and a follower's live weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
from apollo_worker.follow.loop import FollowLoop
from served_model import Exporter
from sharded_model import RankProcesses
from trainer_by_hand import End, Trainer

from apollo_ipc.config import Config


class Machines(NamedTuple):
    learner: Trainer
    model_dir: Path  # the learner's
    config: Config  # the follower's
    served: Exporter | RankProcesses  # the follower's

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
