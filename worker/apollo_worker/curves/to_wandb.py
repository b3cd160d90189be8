"""Curves at Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline, WANDB_DIR and the like hold as ever."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import wandb

from apollo_worker.curves.keeper import PROJECT, Keeper, OpenRun, Point, Run


def keeper(state_dir: Path) -> Keeper:
    directory = Path(os.environ.get("WANDB_DIR", state_dir))
    return lambda run: WandbRun(run, directory)


class WandbRun(OpenRun):
    def __init__(self, run: Run, directory: Path):
        mode = cast(Literal["online", "offline", "disabled"] | None, os.environ.get("WANDB_MODE"))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.run_id,
            name=run.name,
            config=run.facts,
            dir=directory,
            resume="allow",
            reinit="create_new",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        # What the server has; offline nobody can say, and the caller's own mark counts.
        self.last_step = max(0, self._run.starting_step - 1)

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(point.values, step=point.step, commit=True)  # else the row waits for the next step

    def close(self, ended: str | None) -> None:
        if ended is not None:
            self._run.summary["state"] = ended
        self._run.finish(exit_code=1 if ended in ("failed", "quarantined") else 0)
