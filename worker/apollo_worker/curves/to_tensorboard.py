"""Curves as TensorBoard's event files: state_dir/tensorboard/RUN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.summary import Writer

from apollo_worker.curves.keeper import Keeper, OpenRun, Point


def keeper(state_dir: Path) -> Keeper:
    return lambda run: BoardRun(state_dir / "tensorboard" / run.name)


class BoardRun(OpenRun):
    def __init__(self, directory: Path):
        self.last_step = max((_last_step(file) for file in directory.glob("events.out.*")), default=0)
        self._writer = Writer(str(directory))

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step)
        self._writer.flush()

    def close(self, ended: str | None) -> None:
        self._writer.close()


def _last_step(file: Path) -> int:
    """Up to the record that a kill cut off, if there is one: the loader ends before it."""
    return max(
        (event.step for event in EventFileLoader(str(file)).Load() if event.HasField("summary")), default=0
    )
