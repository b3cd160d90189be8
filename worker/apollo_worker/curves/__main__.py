"""`python -m apollo_worker.curves NAME STATE_DIR`: feeds one library, until SIGTERM.

The front starts one for each of `train.log_to`, and again where it ends: what a library misses meanwhile
stands in the queue's file. Neither training nor serving waits for it.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path

sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # some of them would load it

from apollo_ipc.errors import ConfigError
from apollo_ipc.process.flag import Flag
from apollo_ipc.process.say import say
from apollo_worker.curves.feed import Feed
from apollo_worker.curves.keeper import Keeper
from apollo_worker.curves.libraries import NAMES, keeper_of
from apollo_worker.curves.marks import Marks, marks_path
from apollo_worker.jobs.queue_file import QueueFile
from apollo_worker.process import log_as

log = logging.getLogger(__name__)
LOOK_S = 1.0
TICK_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("state_dir", type=Path)
    args = parser.parse_args()
    stopping = Flag()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    log_as("curves")
    os.nice(10)
    try:
        feed_until(stopping, args.state_dir, args.name, keeper_of(args.name, args.state_dir))
    except ConfigError as error:
        say(f"{error.field}: {error.message}")
        sys.exit(error.exit_code)
    except Exception as error:
        # Of the library: a server that is away, a full disk.
        said = " ".join(str(error).split())
        log.warning(
            "%s: %s: %s; it is tried again, and told what it missed", args.name, type(error).__name__, said
        )
        sys.exit(1)


def feed_until(stopping: Flag, state_dir: Path, name: str, keeper: Keeper) -> None:
    """What is there when it is stopped is told still."""
    queue = QueueFile(state_dir / "queue.sqlite")
    try:
        with Marks(marks_path(state_dir), name) as marks:
            feed = Feed(queue, marks, keeper)
            while True:
                is_last = stopping.is_set()
                while feed.look():
                    pass
                if is_last:
                    break
                until = time.monotonic() + LOOK_S
                while time.monotonic() < until and not stopping.is_set():
                    time.sleep(TICK_S)
            feed.close()
    finally:
        queue.close()


if __name__ == "__main__":
    main()
