"""`python -m apollo_worker.follow FD`: the follower, a child of the front in the trainer's place."""

from __future__ import annotations

import sys

from apollo_worker.trainer.__main__ import run
from apollo_worker.trainer.front_end import TrainerEnd


def make_loop(end: TrainerEnd):
    from apollo_worker.follow.loop import FollowLoop  # imports torch: only with the lock

    return FollowLoop(end)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), make_loop))
