"""A disk that remembers every operation, to be replayed on a Platter (platter.py) with a power cut after any.

Each operation is done for real in the directory `root`, and logged with paths relative to it. A process that
is killed is another thing than a power cut: its operations so far stay visible to the next process, and what
was not flushed is as unflushed as before. `kill_before` and `revive` do that.
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from apollo_ipc.checkpoint.disk import Disk, OpenFile
from apollo_ipc.errors import CheckpointError

FLUSHES = ("sync", "sync_dir")
START_S, PROCESS_S = 1_700_000_000, 10_000_000


class Killed(BaseException):
    """Not an Exception: no handler of the code under test may mistake it for an error that it can treat."""


class Operation(NamedTuple):
    """`kind`: a method of Disk; or "mark": from here on only the outcomes `allowed` are right ones, and where
    `is_finished`, even without any recovery."""

    kind: str
    path: str = ""
    other: str = ""  # source of a rename or link
    data: bytes = b""
    mtime_ns: int = 0
    mode: int = 0
    allowed: frozenset = frozenset()
    is_finished: bool = False
    site: str = ""  # of a flush: where in the package it is called from

    def __str__(self) -> str:
        return f"{self.kind} {self.other + ' -> ' if self.other else ''}{self.path or '.'}"


class SimulatedDisk(Disk):
    """The disk of process number `process` in `root`. Its clock begins after those of the processes before
    it and goes on by a second with each write: the kernel's stands still for milliseconds, and what is done
    in the same way again shall leave the same bytes."""

    def __init__(self, root: Path, process: int = 0):
        self.root = root
        self.log: list[Operation] = []
        self._clock = itertools.count(START_S + process * PROCESS_S)
        self._kill_before: int | None = None

    def allow(self, *outcomes: object, is_finished: bool = False) -> None:
        """A power cut from here on must lead to one of these."""
        self.log.append(Operation("mark", allowed=frozenset(outcomes), is_finished=is_finished))

    def kill_before(self, index: int) -> None:
        """The process dies before the log's entry number `index`, in the middle of it if that is a write."""
        self._kill_before = index

    def revive(self) -> None:
        """What follows is done by another process."""
        self._kill_before = None

    def create(self, path: Path, mode: int = 0o644) -> OpenFile:
        self._log("create", path, mtime_ns=self._now(), mode=mode)
        file = super().create(path, mode)
        os.utime(file.fd, ns=(self.log[-1].mtime_ns,) * 2)
        return file

    def write(self, file: OpenFile, data: bytes | memoryview) -> None:
        is_last = self._kill_before is not None and len(self.log) == self._kill_before
        if is_last:
            self._kill_before += 1
            data = memoryview(data)[: len(data) // 2]
        self._log("write", file.path, data=bytes(data), mtime_ns=self._now())
        super().write(file, data)
        os.utime(file.fd, ns=(self.log[-1].mtime_ns,) * 2)
        if is_last:
            raise Killed

    def sync(self, file: OpenFile) -> None:
        self._log("sync", file.path, site=_site(self._relative(file.path)))

    def sync_dir(self, path: Path) -> None:
        self._log("sync_dir", path, site=_site(self._relative(path)))

    def rename(self, source: Path, target: Path) -> None:
        self._log("rename", target, source)
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        if not target.exists():
            self._log("link", target, Path(os.path.realpath(source)))
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._log("unlink", path)
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        if not path.exists():
            self._log("mkdir", path)
        super().mkdir(path)

    def rmdir(self, path: Path) -> None:
        self._log("rmdir", path)
        super().rmdir(path)

    @contextmanager
    def lock(self, path: Path, wait_s: float, *, is_shared: bool = False) -> Iterator[None]:
        is_new = not path.exists()
        with super().lock(path, wait_s, is_shared=is_shared):
            if is_new:
                os.utime(path, ns=(0, 0))
                self._log("create", path, mode=0o644)
            yield

    def _log(self, kind: str, path: Path, source: Path | None = None, **fields) -> None:
        if self._kill_before is not None and len(self.log) >= self._kill_before:
            raise Killed
        other = self._relative(source) if source else ""
        self.log.append(Operation(kind, self._relative(path), other, **fields))

    def _now(self) -> int:
        return next(self._clock) * 1_000_000_000

    def _relative(self, path: Path) -> str:
        return str(path)[len(str(self.root)) + 1 :]


class ReadOnlyDisk(Disk):
    """Refuses everything that would change something."""

    @contextmanager
    def lock(self, path: Path, wait_s: float, *, is_shared: bool = False) -> Iterator[None]:
        _refuse()
        yield


def _refuse(*_: object) -> None:
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    raise CheckpointError("the disk is only read") from error


for _operation in ("create", "write", "rename", "link", "unlink", "mkdir", "rmdir"):
    setattr(ReadOnlyDisk, _operation, _refuse)


def _site(flushed: str) -> str:
    """The function of apollo_ipc.checkpoint that flushes, for `publish` with its caller, and what it flushes;
    "" where the package does not."""
    calls, frame = [], sys._getframe(2)
    while frame is not None and len(calls) < 2:
        code = frame.f_code
        if "/apollo_ipc/checkpoint/" in code.co_filename:
            calls.append(code.co_name)
        frame = frame.f_back
    if not calls:
        return ""
    where = " < ".join(calls if calls[0] == "publish" else calls[:1])
    return f"{where}: {flushed.rpartition('/')[2].split('-')[0] or 'model directory'}"
