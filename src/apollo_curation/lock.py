"""One process at a time, which dies with its lock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_ipc.errors import NotReady
from apollo_ipc.hold import Held, Hold

POLL_S = 0.2


@contextmanager
def alone(
    path: Path, stop: Callable[[], bool] = lambda: False, what: str = "apollo-ipc curate"
) -> Iterator[None]:
    """Waits until no other holder, in this or another process, is inside with the same file.

    Not reentrant. what: this command, for those who wait. Raises NotReady when `stop()` becomes true before
    that.
    """
    while True:
        try:
            hold = Hold(path, what)
            break
        except Held as held:
            if stop():
                raise NotReady(f"{held.who} is training; stopped waiting for it") from None
            time.sleep(POLL_S)
    with hold:
        yield
