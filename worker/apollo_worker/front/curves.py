"""The processes that feed curves to libraries: the front keeps them, and waits for none."""

from __future__ import annotations

import os
import sys
import time

from apollo_ipc.config import Config
from apollo_ipc.process.supervise import Child, Kept

STOP_S = 5.0  # for what was trained last; what a slow library misses is told after the next start
LOOK_S = 0.05


class CurveFeeds:
    """One for each of `train.log_to`. Only the main thread calls (front.trainer_process says why)."""

    def __init__(self, config: Config):
        self._state_dir = config.state_dir
        self._kept = [
            Kept(Child(f"the feed of {name}", self._command(name), _environment()))
            for name in config.train.log_to
        ]

    def _command(self, name: str) -> list[str]:
        return [sys.executable, "-m", "apollo_worker.curves", name, str(self._state_dir)]

    def start(self) -> None:
        for one in self._kept:
            one.start()

    def watch(self) -> None:
        for one in self._kept:
            one.watch()

    def stop(self) -> None:
        children = [one.child for one in self._kept]
        for child in children:
            child.ask_to_stop()
        until = time.monotonic() + STOP_S
        while any(child.is_running for child in children) and time.monotonic() < until:
            time.sleep(LOOK_S)
        for child in children:
            child.kill()


def _environment() -> dict[str, str]:
    """systemd hears from the front alone."""
    return {
        name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")
    }
