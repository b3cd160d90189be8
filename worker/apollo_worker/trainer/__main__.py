"""`python -m apollo_worker.trainer FD`: the trainer, a child of the front (apollo_worker.front.front).

FD: its end of the link. It ends by itself when the front does: SIGTERM comes from the kernel, end of file
from the link.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

# Before torch is loaded, which starts OpenMP: a spinning thread would take the CPU from serving.
for _name, _value in (("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0"), ("KMP_BLOCKTIME", "0")):
    os.environ.setdefault(_name, _value)

import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Protocol

from apollo_ipc.errors import ApolloError
from apollo_ipc.process.serving import die_with_parent
from apollo_worker.link.link import FromFront, Link, Start
from apollo_worker.process import log_as
from apollo_worker.trainer.front_end import TrainerEnd, trainer_lock

log = logging.getLogger(__name__)


class Runs(Protocol):
    def run(self) -> None: ...


def run(link_fd: int, make_worker: Callable[[TrainerEnd], Runs]) -> int:
    """Everything around the main loop: the link, signals, the lock. Returns the exit status."""
    die_with_parent()
    log_as("trainer")
    link = Link(socket.socket(fileno=link_fd), FromFront)
    try:
        start = link.receive()
        assert isinstance(start, Start), f"{type(start).__name__} came first"
    except EOFError:
        return 0  # the front ended meanwhile
    end = TrainerEnd(link, start)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.board.stopping.set())
    end.start()
    try:
        with trainer_lock(end.board, end.config) as has_lock:
            if has_lock:
                make_worker(end).run()
    except ApolloError as error:
        log.error("%s", error.message)
        end.say_error(error.message)
        return error.exit_code
    except Exception as error:
        log.exception("the trainer ends; the next one recovers")
        end.say_error(f"{type(error).__name__}: {error}")
        return 1
    finally:
        end.finish()
    return 0


def make_main_loop(end: TrainerEnd) -> Runs:
    from apollo_worker.trainer.loop import MainLoop  # imports torch: only with the lock, which may take time

    return MainLoop(end)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), make_main_loop))
