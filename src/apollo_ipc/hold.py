"""One lock for all that only one process may use at a time: a flock, which says who holds it.

The kernel frees it when its holder ends, however that happens, so a number that another process has got since
harms nothing: what stands in the file is for words only.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from apollo_ipc.errors import AlreadyRunning

log = logging.getLogger(__name__)
# What network file systems without locks answer.
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_warned: set[Path] = set()
_held: set[int] = set()


class Holder(msgspec.Struct, frozen=True):
    """what: the command, in a person's words; since: seconds since the epoch."""

    pid: int
    what: str
    since: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.what} (pid {self.pid}, since {since})"


class Held(AlreadyRunning):
    """who: the process that has the lock, in words that begin a sentence."""

    def __init__(self, path: Path, holder: Holder | None):
        self.who = "another process" if holder is None else str(holder)
        super().__init__(f"{self.who} holds {path}")


class Hold:
    """The lock on the file `path` (mode 0600 where it is made), from the construction to `release` or the end
    of the block. what: this command, for those who are refused. Raises Held; OSError."""

    def __init__(self, path: Path, what: str):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not try_lock(fd, path):
                raise Held(path, _read(fd))
            os.ftruncate(fd, 0)
            os.pwrite(fd, msgspec.json.encode(Holder(os.getpid(), what, time.time())) + b"\n", 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd: int | None = fd
        _held.add(fd)

    def release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            _held.discard(fd)
            with suppress(OSError):  # whatever a network file system says: the lock goes with the descriptor
                os.ftruncate(fd, 0)
                fcntl.flock(fd, fcntl.LOCK_UN)  # in a child, too, that was forked a moment ago
            os.close(fd)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def try_lock(fd: int, path: Path, *, is_shared: bool = False, without: bool = True) -> bool:
    """Whether the flock was got at once. Where the file system knows none: `without`, and a warning."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        if path not in _warned:
            _warned.add(path)
            log.warning("%s cannot be locked (%s): see that only one process uses it", path, error.strerror)
        return without
    return True


def is_held(path: Path) -> bool:
    """Whether a process has the lock now. Looks with a shared lock for a moment: whoever takes it just then
    has to try again, as every holder of ours does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd, path, is_shared=True)
    finally:
        os.close(fd)


def _read(fd: int) -> Holder | None:
    """None where the holder has not said it yet, or is an older program."""
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _let_go_in_child() -> None:
    """A forked child has the same flock: it must not outlive its parent's."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)
