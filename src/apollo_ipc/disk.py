"""Every durable file operation of a checkpoint, in one small layer that a crash simulator can replace.

Nothing else in this project writes, flushes, renames or removes a checkpoint file. Each method is one step
that a crash may stop at; an operation that fails raises CheckpointError with the path and the reason.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from apollo_ipc.errors import CheckpointError

LOCK_POLL_S = 0.02


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
    def lock(self, path: Path, wait_s: float) -> Iterator[None]:
        """Holds an exclusive flock on the file `path`, which is created and stays.

        The kernel releases it when its holder dies, however that happens. Raises CheckpointError when
        another holder keeps it for longer than `wait_s`.
        """
        with _in_words("lock", path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            give_up_at = time.monotonic() + wait_s
            while not _try_lock(fd, path):
                if time.monotonic() >= give_up_at:
                    raise CheckpointError(
                        f"{path.parent.parent}: another process is writing this checkpoint "
                        f"(it has held {path} for more than {wait_s:g} s)"
                    )
                time.sleep(LOCK_POLL_S)
            yield
        finally:
            os.close(fd)


DISK = Disk()


def _try_lock(fd: int, path: Path) -> bool:
    with _in_words("lock", path):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


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
def _in_words(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = f"; {HINTS[error.errno]}" if error.errno in HINTS else ""
        raise CheckpointError(f"cannot {verb} {path}: {error.strerror}{hint}") from error
