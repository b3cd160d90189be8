"""How the worker's processes run: whose a line of the log is, and idle priority for what trains."""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal

from apollo_ipc.config import Config

log = logging.getLogger(__name__)


def log_as(role: Literal["front", "trainer", "curves"]) -> None:
    """They log to one stream: each line says whose it is."""
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s {role} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request


def use_idle_priority(config: Config) -> None:
    """SCHED_IDLE (sched(7)) for the calling thread and every thread that it will start, e.g. OpenMP's:
    training must not be felt by serving.

    Beside vLLM on two cores a synthetic burner raised completion p99 to 1.04x with it and passive OpenMP
    waiting, to 2.6x without (docs/operations.md). On a GPU it would only delay kernel launches, and is left
    alone.
    """
    import torch  # not in the front

    # Not OMP_NUM_THREADS, which is vLLM's: the worker may have inherited it.
    torch.set_num_threads(config.worker.num_threads or len(os.sched_getaffinity(0)))
    if torch.cuda.is_available() or not config.worker.idle_priority:
        return
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError as error:
        log.warning("SCHED_IDLE refused (%s): training competes with serving for the CPU", error.strerror)
