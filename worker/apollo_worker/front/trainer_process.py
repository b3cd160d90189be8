"""The front's hold on the trainer: started, watched, killed where it hangs, started again, stopped.

Only the front's main thread calls these methods: the kernel tells a child of its parent *thread's* end
(PR_SET_PDEATHSIG in prctl(2)).
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from apollo_ipc.config import Config
from apollo_ipc.wire.replies import Progress, TrainerState
from apollo_worker.link.link import ENDED, FromTrainer, Link, Start, Stop, make_pair
from apollo_worker.link.status_board import SeenTrainer

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "apollo_worker.trainer")
FOLLOWER = (sys.executable, "-m", "apollo_worker.follow")
RESTART_AFTER_S = (1.0, 2.0, 5.0, 15.0, 60.0)  # after the first, the second, ... death in a row
STEADY_AFTER_S = 120.0  # a trainer that ran this long has not died "in a row"
# While it only waits, it looks around four times a second; on a busy machine it gets few milliseconds of it.
IDLE_TIMEOUT_S = 60.0
WAITING = ("idle", "paused", "waiting for vLLM", "waiting for the old trainer")
KILL_AFTER_S = 5.0  # for a trainer that has closed its link
READ_S = 1.0


class TrainerChild:
    """One trainer at a time. read: called in a thread of its own for each trainer's Link, until its end."""

    def __init__(self, config: Config, read: Callable[[Link], None], command: tuple[str, ...] = COMMAND):
        self.link: Link | None = None
        self.num_deaths = 0  # in a row
        self.error: str | None = None  # how the trainer before this one ended, until this one is steady
        self._last_words: str | None = None
        self._num_bad_ends = self._num_kills = 0
        self._is_killed = False
        self._config = config
        self._read = read
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = self._moved_at = 0.0
        self._start_again_at = 0.0  # time.monotonic()
        self._progress: Progress | None = None
        self._closed_at: float | None = None

    @property
    def open_link(self) -> Link | None:
        """None where nobody would read what is sent."""
        return self.link if self._process and self.link and not self.link.is_closed.is_set() else None

    def can_start(self) -> bool:
        return self._process is None and time.monotonic() >= self._start_again_at

    def start(self, state: TrainerState) -> None:
        ours, its = make_pair()
        # systemd hears the front only.
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        with its:
            self._process = subprocess.Popen(
                [*self._command, str(its.fileno())],
                pass_fds=[its.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self.link = Link(ours, FromTrainer)
        self.link.send(Start(self._config, state))
        self._started_at = self._moved_at = time.monotonic()
        self._progress = self._closed_at = self._last_words = None
        self._is_killed = False
        self._reader = threading.Thread(
            target=self._read, args=(self.link,), name="apollo-trainer", daemon=True
        )
        self._reader.start()

    def on_state(self, state: TrainerState) -> None:
        """Whether it gets on is what the count says, not that messages come: another thread sends those."""
        if self._progress is None or state.progress.activity_count != self._progress.activity_count:
            self._moved_at = time.monotonic()
        self._progress = state.progress
        if state.progress.activity == ENDED:
            self._last_words = state.attach_error

    def has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def look(self) -> None:
        """Forgets why the one before ended, once this one has run for a while."""
        if self._process is not None and time.monotonic() - self._started_at > STEADY_AFTER_S:
            self.error = None

    def is_hung(self) -> bool:
        if self._process is None:
            return False
        is_waiting = self._progress is not None and self._progress.activity in WAITING
        limit_s = min(IDLE_TIMEOUT_S, self._config.worker.step_timeout_s)
        limit_s = limit_s if is_waiting else self._config.worker.step_timeout_s
        return time.monotonic() - self._moved_at > limit_s or self._has_lost_its_link()

    def _has_lost_its_link(self) -> bool:
        """It runs, but we cannot talk any more (an impossible message): it stops by itself, or is killed."""
        if self.link is None or not self.link.is_closed.is_set():
            return False
        self._closed_at = self._closed_at or time.monotonic()
        return time.monotonic() - self._closed_at > self._config.worker.step_timeout_s + KILL_AFTER_S

    def kill(self) -> None:
        """What it has done of a step is a torn step: the next trainer restores the weights."""
        if self._process is not None and self._process.poll() is None:
            self._num_kills += not self._is_killed
            self._is_killed = True
            os.kill(self._process.pid, signal.SIGKILL)

    def seen(self) -> SeenTrainer:
        pid = self._process.pid if self._process is not None else None
        return SeenTrainer(pid, self._num_bad_ends, self._num_kills)

    def reap(self) -> str:
        """After its end: how it ended, and when it starts again."""
        assert self._process is not None
        self._close_link()
        status = self._process.wait()
        now = time.monotonic()
        is_steady = now - self._started_at > STEADY_AFTER_S or status == 0  # 0: it made way for a new one
        self.num_deaths = 1 if is_steady else self.num_deaths + 1
        wait_s = RESTART_AFTER_S[min(self.num_deaths, len(RESTART_AFTER_S)) - 1]
        self._num_bad_ends += status != 0
        self._start_again_at = now + wait_s
        self._process = None
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        why = f" ({self._last_words})" if self._last_words else ""
        ended = f"the trainer {how}{why}"
        if status:
            again = f", the {self.num_deaths}. time in a row" if self.num_deaths > 1 else ""
            self.error = ended + again
        return f"{ended}; it starts again in {wait_s:g} s"

    def stop(self, on_wait: Callable[[], None]) -> None:
        """It finishes its step and its last sync; killed where it gets on with neither for `step_timeout_s`.

        on_wait: called about ten times a second meanwhile.
        """
        if self._process is None or self.link is None:
            return
        self.link.send(Stop())
        if self._process.poll() is None:
            self._process.terminate()  # where it does not read its link yet
        while not self.has_ended():
            if self.is_hung():
                logger.error("the trainer does not stop: it is killed")
                self.kill()
            on_wait()
            time.sleep(0.1)
        self._close_link()
        self._process = None

    def _close_link(self) -> None:
        """After the trainer's end: what it still said is read first, so nothing comes from it later."""
        assert self.link is not None
        self._reader.join(READ_S)
        self.link.close()
