"""Who teaches: the process beside a server, or the command where there is none. One at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from apollo_curation.chat_client import learner
from apollo_curation.lock import alone
from apollo_curation.settings import CurationConfig
from apollo_curation.teach.served import ServedLearner
from apollo_curation.teach.teacher import Teacher
from apollo_curation.train_client import TrainClient
from apollo_ipc.config import Config
from apollo_ipc.errors import NotReady
from apollo_ipc.hold import Held, Hold
from apollo_ipc.teaching.store import ENDED_PHASES, TeachJob, TeachStore, teacher_lock

log = logging.getLogger(__name__)
POLL_S = 0.5
WHAT = "the teacher"


@contextmanager
def the_teacher(config: Config) -> Iterator[bool]:
    """Whether this process is the teacher now: nobody else is until the block ends, or the process."""
    try:
        hold = Hold(teacher_lock(config), WHAT)
    except Held:
        yield False
        return
    with hold:
        yield True


def serve_for_ever(config: CurationConfig, store: TeachStore, say: Callable[[str], None]) -> None:
    """Teaches whenever no other process does: a command that has taken over is waited for."""
    with alone(teacher_lock(config), what=WHAT):
        serve_jobs(config, store, lambda: False, say)


def serve_jobs(
    config: CurationConfig,
    store: TeachStore,
    is_over: Callable[[], bool],
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Takes on one job after the other until `is_over()`, which is asked between two phases."""
    with closing(learner(config)) as chat, closing(TrainClient(config)) as training:
        teacher = Teacher(store, ServedLearner(chat), training, say=say)
        while not is_over():
            job = store.first_unfinished()
            try:
                while job is not None and job.phase not in ENDED_PHASES and not is_over():
                    say(f"{job.id}: {job.phase}" + (f", round {job.round}" if job.round else ""))
                    job = teacher.advance(job)
            except NotReady as error:  # the server is away: the phase is done again
                log.warning("teaching waits: %s", error.message)
            time.sleep(POLL_S if job is None or job.phase not in ENDED_PHASES else 0)


def wait_for(config: CurationConfig, store: TeachStore, job_id: str, say: Callable[[str], None]) -> TeachJob:
    """The job when it has ended: taught here, unless another process is the teacher."""
    told = ""
    while (job := store.job(job_id)).phase not in ENDED_PHASES:
        with the_teacher(config) as is_ours:
            if is_ours:
                serve_jobs(config, store, lambda: store.job(job_id).phase in ENDED_PHASES, say)
                continue
        if job.phase != told:
            say(f"{job.id}: {job.phase} (another process teaches)")
            told = job.phase
        time.sleep(POLL_S)
    return job
