"""A disk that stops at its n-th operation: every place where a sync or a recovery can be cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apollo_ipc.checkpoint.disk import Disk

COUNTED = ("create", "write", "sync", "sync_dir", "rename", "unlink", "mkdir", "rmdir")


class Crash(BaseException):
    """Not an Exception: no handler of the code under test may mistake it for an error that it can treat."""


class SteppedDisk(Disk):
    """Calls `stop` before operation number `stop_at` (from 0) and before each later one: the dead do nothing.

    A write that is stopped leaves half of its bytes. `steps` lists what was asked for.
    """

    def __init__(self, stop_at: int | None = None):
        self.stop_at = stop_at
        self.steps: list[tuple[str, str]] = []

    def stop(self) -> None:
        raise Crash

    def step(self, operation: str, *args: Any) -> Any:
        is_dead = self.stop_at is not None and len(self.steps) > self.stop_at
        is_last = len(self.steps) == self.stop_at
        target = args[1] if operation == "rename" else getattr(args[0], "path", args[0])
        self.steps.append((operation, Path(target).name))
        if is_last and operation == "write":
            file, data = args
            Disk.write(self, file, data[: len(data) // 2])
        if is_dead or is_last:
            self.stop()
        return getattr(Disk, operation)(self, *args)


def _counted(operation: str) -> Any:
    return lambda self, *args: self.step(operation, *args)


for _operation in COUNTED:
    setattr(SteppedDisk, _operation, _counted(_operation))
