"""Keeps vLLM and the worker running together and ends them together.

Signal handlers only record the signal; the loop acts on it. Each child leads a process group of its own, so
a Ctrl-C at the terminal reaches only us, and the worker can be stopped first, while vLLM's memory, which it
has to write to disk, is still there. A child whose supervisor is killed gets SIGTERM from the kernel.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apollo_ipc.errors import AlreadyRunning, ConfigError
from apollo_ipc.process.say import say
from apollo_ipc.process.serving import die_with_parent

TICK_S = 0.1
STOP_WORKER_S = 300.0  # it finishes its step and writes the checkpoint
STOP_VLLM_S = 30.0
RESTART_AFTER_S = (1.0, 2.0, 5.0, 15.0, 60.0)  # after the first, the second, ... death in a row
STEADY_AFTER_S = 120.0  # a worker that ran this long has not died "in a row"
FINAL_STATUSES = (ConfigError.exit_code, AlreadyRunning.exit_code)  # starting again would end the same way


class Child:
    """A process of ours and the group that it leads. What it started outlives it: a worker's trainer ends by
    itself after its step. Only `kill` ends whole groups, those of its earlier starts too."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name = name
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        # Ended and not reaped: until it is, its number cannot become that of a stranger's group.
        self._earlier: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        if self._process is not None:
            self._earlier.append(self._process)
        for process in [one for one in self._earlier if not _has_members(one.pid)]:
            process.wait()
            self._earlier.remove(process)
        self._process = subprocess.Popen(
            self._command, env=self._environment, start_new_session=True, preexec_fn=die_with_parent
        )

    @property
    def is_running(self) -> bool:
        return self._process is not None and self.status is None

    @property
    def status(self) -> int | None:
        """None while it runs or before it started, else the exit status (negative: the signal)."""
        if self._process is None or self._process.returncode is not None:
            return self._process and self._process.returncode
        # Looked at, not reaped.
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def ask_to_stop(self) -> None:
        if self._process and self.is_running:
            self._process.terminate()

    def kill(self) -> None:
        """It and whatever it started and left; also after it ended by itself."""
        for process in (*self._earlier, *([self._process] if self._process else [])):
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._earlier.clear()


def _has_members(group: int) -> bool:
    """Whether a process that still runs belongs to that process group."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                return True
    return False


class Kept:
    """A child that is started again when it ends, later each time it dies soon."""

    def __init__(self, child: Child):
        self.child = child
        self._started_at = 0.0
        self._deaths_in_a_row = 0
        self._restart_at: float | None = None
        self._is_given_up = False

    def start(self) -> None:
        self._restart_at, self._started_at = None, time.monotonic()
        self.child.start()

    def watch(self) -> None:
        if self._is_given_up or self.child.status is None:
            return
        now, ended = time.monotonic(), f"{self.child.name} ended with {_in_words(self.child.status)}"
        if self._restart_at is not None:
            if now >= self._restart_at:
                self.start()
            return
        if self.child.status in FINAL_STATUSES:
            say(f"{ended} and is not started again; vLLM serves on")
            self._is_given_up = True
            return
        if now - self._started_at > STEADY_AFTER_S:
            self._deaths_in_a_row = 0
        wait_s = RESTART_AFTER_S[min(self._deaths_in_a_row, len(RESTART_AFTER_S) - 1)]
        self._deaths_in_a_row += 1
        self._restart_at = now + wait_s
        say(f"{ended}; it starts again in {wait_s:g} s")


class Supervisor:
    """vLLM, and children that work with it, in the order in which they are ended; before vLLM, so that a
    worker still finds the memory that it saves. `on_tick` is called ten times a second while vLLM runs."""

    def __init__(self, vllm: Child, *kept: Child, on_tick: Callable[[], None] = lambda: None):
        self._vllm = vllm
        self._kept = [Kept(child) for child in kept]
        self._on_tick = on_tick

    def run(self) -> int:
        """Until vLLM ends or a signal comes; the exit status for our own process. Leaves nothing running."""
        with _recorded_signals() as signals:
            try:
                self._vllm.start()
                for one in self._kept:
                    one.start()
                while not signals and self._vllm.is_running:
                    for one in self._kept:
                        one.watch()
                    self._on_tick()
                    time.sleep(TICK_S)
                if signals:
                    say(f"{signals[0].name}: stopping")
                else:
                    say(f"vLLM ended with {_in_words(self._vllm.status)}; stopping")
                self._stop(signals)
            finally:
                for child in (*(one.child for one in self._kept), self._vllm):
                    child.kill()
        if signals:
            return 0 if signals[0] == signal.SIGTERM else 128 + signals[0]
        status = self._vllm.status or 0
        return 128 - status if status < 0 else status

    def _stop(self, signals: list[signal.Signals]) -> None:
        """vLLM last: a worker saves what it trained. One more signal ends everything at once."""
        num_signals = len(signals)
        patience = [(one.child, STOP_WORKER_S) for one in self._kept] + [(self._vllm, STOP_VLLM_S)]
        for child, patience_s in patience:
            if not child.is_running:
                continue
            say(f"waiting for {child.name} to end (again Ctrl-C: kill it)")
            child.ask_to_stop()
            deadline = time.monotonic() + patience_s
            while child.is_running and len(signals) == num_signals and time.monotonic() < deadline:
                time.sleep(TICK_S)
            if child.is_running:
                say(f"killing {child.name}")
            child.kill()


@contextmanager
def _recorded_signals() -> Iterator[list[signal.Signals]]:
    received: list[signal.Signals] = []

    def record(number: int, _: object) -> None:
        received.append(signal.Signals(number))

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, record) for number in watched]
    try:
        yield received
    finally:
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)


def _in_words(status: int | None) -> str:
    return signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
