"""Training must not be felt by serving: on a CPU, its threads run only in the time that serving leaves."""

from __future__ import annotations

import logging
import os

import torch

from apollo_ipc.config import Config

log = logging.getLogger(__name__)


def use_idle_priority(config: Config) -> None:
    """SCHED_IDLE (sched(7)) for the calling thread and every thread that it will start, e.g. OpenMP's.

    Beside vLLM on two cores a synthetic burner raised completion p99 to 1.04x with it and passive OpenMP
    waiting, to 2.6x without (docs/operations.md). On a GPU it would only delay kernel launches, and is left
    alone.
    """
    # Not OMP_NUM_THREADS, which is vLLM's: the worker may have inherited it.
    torch.set_num_threads(config.worker.num_threads or len(os.sched_getaffinity(0)))
    if torch.cuda.is_available() or not config.worker.idle_priority:
        return
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError as error:
        log.warning("SCHED_IDLE refused (%s): training competes with serving for the CPU", error.strerror)
