"""One process at a time, which dies with its lock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_ipc.errors import NotReady

POLL_S = 0.2


@contextmanager
def alone(path: Path, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Waits until no other holder, in this or another process, is inside with the same file.

    Not reentrant. Raises NotReady when `stop()` becomes true before that.
    """
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop():
                    raise NotReady("another process is training; stopped waiting for it") from None
                time.sleep(POLL_S)
        yield
    finally:
        os.close(held)
