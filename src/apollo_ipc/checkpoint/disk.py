"""Every durable file operation of a checkpoint, in one small layer that a crash simulator can replace.

Nothing else in this project writes, flushes, renames or removes a checkpoint file. Each method is one step
that a crash may stop at; an operation that fails raises CheckpointError with the path and the reason.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from apollo_ipc.errors import CheckpointError
from apollo_ipc.hold import try_lock

LOCK_POLL_S = 0.02
THROTTLE_SYNC_BYTES = 64 * 1024 * 1024


class OpenFile(NamedTuple):
    """A file being written; `path` is there for messages and simulators."""

    path: Path
    fd: int


class Disk:
    """The real disk. A simulator overrides methods; none of them calls another."""

    def create(self, path: Path, mode: int = 0o644) -> OpenFile:
        """A new empty file with exactly the permission bits `mode`, in place of an older one."""
        with _in_words("create", path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            os.fchmod(fd, mode)
        return OpenFile(path, fd)

    def open(self, path: Path) -> OpenFile:
        """A file that is there, to be flushed and no more."""
        with _in_words("open", path):
            return OpenFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def write(self, file: OpenFile, data: bytes | memoryview) -> None:
        """Appends all of `data` (a view of bytes), which the kernel may take in several pieces."""
        rest = memoryview(data)
        with _in_words("write", file.path):
            while rest:
                rest = rest[os.write(file.fd, rest) :]

    def sync(self, file: OpenFile) -> None:
        """Returns when the bytes of `file` survive a power cut.

        Never to be called again after it has failed: Linux reports a failed write-back once and marks the
        pages clean, so a second call would succeed without the data being on disk (fsyncgate, 2018).
        """
        with _in_words("flush", file.path):
            os.fdatasync(file.fd)

    def close(self, file: OpenFile) -> None:
        with _in_words("close", file.path):
            os.close(file.fd)

    def sync_dir(self, path: Path) -> None:
        """Returns when the names in directory `path` survive a power cut. Not to be retried, like sync."""
        with _in_words("flush", path):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic: `target` is the old file or the new one at every moment. Replaces a symlink by the file."""
        with _in_words("rename a file to", target):
            os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """`target` is another name of the file `source`, or of what it points to if it is a symlink.

        A `target` that is there already stays.
        """
        with _in_words("link a file to", target), suppress(FileExistsError):
            os.link(os.path.realpath(source), target)

    def unlink(self, path: Path) -> None:
        with _in_words("remove", path):
            os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """A directory that is there already is as good as a new one."""
        with _in_words("create", path), suppress(FileExistsError):
            os.mkdir(path)

    def rmdir(self, path: Path) -> None:
        with _in_words("remove", path):
            os.rmdir(path)

    def free_bytes(self, path: Path) -> int:
        """What this user may still write to the file system of `path`."""
        info = os.statvfs(path)
        return info.f_bavail * info.f_frsize

    @contextmanager
    def lock(self, path: Path, wait_s: float, *, is_shared: bool = False) -> Generator[None]:
        """Holds a flock on the file `path`, which is created and stays: an exclusive one, or a reader's.

        The kernel releases it when its holder dies, however that happens. Raises CheckpointError when
        another holder keeps it for longer than `wait_s`.
        """
        with _in_words("lock", path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            give_up_at = time.monotonic() + wait_s
            while not _try_lock(fd, path, is_shared=is_shared):
                if time.monotonic() >= give_up_at:
                    raise CheckpointError(
                        f"{path.parent.parent}: another process is using this checkpoint "
                        f"(it has held {path} for more than {wait_s:g} s)",
                        code="checkpoint_busy",
                    )
                time.sleep(LOCK_POLL_S)
            yield
        finally:
            os.close(fd)


DISK = Disk()


def _try_lock(fd: int, path: Path, *, is_shared: bool, without: bool = True) -> bool:
    with _in_words("lock", path):
        return try_lock(fd, path, is_shared=is_shared, without=without)


def is_locked(path: Path) -> bool:
    """Whether some process holds a flock on `path`, a file or a directory; yes where nobody can know."""
    with _in_words("open", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _try_lock(fd, path, is_shared=True, without=False)
    finally:
        os.close(fd)


class ThrottledDisk(Disk):
    """Writes no faster than `bytes_per_s` on average, so that a sync leaves the disk to others as well."""

    def __init__(self, bytes_per_s: float):
        self._bytes_per_s = bytes_per_s
        self._unsynced = 0
        self._free_at = 0.0  # when the next write may begin

    def write(self, file: OpenFile, data: bytes | memoryview) -> None:
        now = time.monotonic()
        if self._free_at > now:
            time.sleep(self._free_at - now)
        super().write(file, data)
        self._free_at = max(self._free_at, now) + len(data) / self._bytes_per_s
        # In small portions to the disk itself: the kernel would collect them and write them out at once.
        self._unsynced += len(data)
        if self._unsynced >= THROTTLE_SYNC_BYTES:
            self._unsynced = 0
            self.sync(file)


class WatchedDisk(Disk):
    """Calls `on_write` after each write: a sign of life from what takes minutes."""

    def __init__(self, on_write: Callable[[], None]):
        self._on_write = on_write

    def write(self, file: OpenFile, data: bytes | memoryview) -> None:
        super().write(file, data)
        self._on_write()


HINTS = {
    errno.EROFS: "a checkpoint can only be synced into a writable model directory",
    errno.EACCES: "a checkpoint can only be synced into a writable model directory",
    errno.EPERM: "a checkpoint can only be synced into a writable model directory",
    errno.ENOSPC: "free some space; the previous checkpoint is untouched",
    errno.EDQUOT: "free some space; the previous checkpoint is untouched",
    errno.EIO: "the disk may be failing; the previous checkpoint is untouched",
    errno.EXDEV: ".apollo must be on the same file system as the shards",
}


@contextmanager
def _in_words(verb: str, path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        hint = f"; {HINTS[error.errno]}" if error.errno in HINTS else ""
        raise CheckpointError(f"cannot {verb} {path}: {error.strerror}{hint}") from error
