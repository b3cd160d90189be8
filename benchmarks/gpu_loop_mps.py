"""NVIDIA's Multi-Process Service for gpu_loop.py: a daemon of its own, for as long as a `with` block.

What is said of MPS here is from NVIDIA's "Multi-Process Service", releases r550 to r575.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gpu_loop_system import LoopFailed

PROGRAM = "nvidia-cuda-mps-control"
START_S, QUIT_S, ASK_S = 30.0, 30.0, 10.0
SOCKET_DIR_BYTES = 80  # a Unix socket's path has 107 (unix(7)), and the daemon chooses the names in there


class MpsDaemon:
    """Processes started inside the `with` block are its clients, by this process's environment. Where CUDA
    does not reach the daemon they run without it and say nothing: `require_clients` looks."""

    def __init__(self, base: Path):
        """base: gets `mps/` with the daemon's sockets and `mps-log/`."""
        self.pipes, self.logs = base / "mps", base / "mps-log"
        self._is_begun = False
        self.environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipes),
            "CUDA_MPS_LOG_DIRECTORY": str(self.logs),
        }

    def __enter__(self) -> MpsDaemon:
        """Raises LoopFailed where there is no such program, or it does not start."""
        if shutil.which(PROGRAM) is None:
            raise LoopFailed(f"--mps needs {PROGRAM}, which comes with NVIDIA's driver; it is not here")
        if len(os.fsencode(self.pipes)) > SOCKET_DIR_BYTES:
            raise LoopFailed(f"{self.pipes} is too long for the sockets of {PROGRAM}: take a shorter --dir")
        for directory in (self.pipes, self.logs):
            directory.mkdir(mode=0o700)
        os.environ.update(self.environment)
        self._is_begun = True
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _start(self) -> None:
        # To a file: the daemon keeps what it inherits, and a pipe would never end.
        with (self.logs / "start.log").open("wb") as log:
            try:
                done = subprocess.run(
                    [PROGRAM, "-d"], env=self._daemon_environment(), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, timeout=START_S,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise LoopFailed(f"{PROGRAM} -d did not return within {START_S:.0f} s") from None
        if done.returncode or not self._answers():
            raise LoopFailed(f"{PROGRAM} -d (status {done.returncode}) does not run: {self._log_tail()}")

    def _answers(self) -> bool:
        """By its pid too: no list of servers is an answer, but of what status is not documented."""
        pid = self._pid()
        return self._ask("get_server_list") is not None or (pid is not None and _runs(pid))

    def _daemon_environment(self) -> dict[str, str]:
        """Without a CUDA_VISIBLE_DEVICES of indices: the daemon would number the devices anew, and the same
        variable would then choose wrongly among them in its clients."""
        env = dict(os.environ)
        if not env.get("CUDA_VISIBLE_DEVICES", "").startswith(("GPU-", "MIG-")):
            env.pop("CUDA_VISIBLE_DEVICES", None)
        return env

    def clients(self) -> list[int]:
        """Process ids of those that are connected."""
        servers = (self._ask("get_server_list") or "").split()
        lists = [self._ask(f"get_client_list {server}") or "" for server in servers]
        return [int(word) for text in lists for word in text.split() if word.isdigit()]

    def require_clients(self, trainer_pids: Iterable[int], serving_group: int) -> int:
        """How many clients there are. Raises LoopFailed unless the trainer and some process of the group that
        serves are among them: they would have run without MPS, and been measured so."""
        found = self.clients()
        who = []
        if not set(found) & set(trainer_pids):
            who.append("the worker")
        if serving_group not in {_group_of(pid) for pid in found}:
            who.append("vLLM")
        if who:
            raise LoopFailed(f"{' and '.join(who)} did not connect to MPS (clients: {found})")
        return len(found)

    def stop(self) -> None:
        """`quit`; where that does not end it, SIGTERM to the process that the daemon itself names."""
        if not self._is_begun:
            return
        self._is_begun = False
        pid = self._pid()
        self._ask("quit", QUIT_S)
        if pid is not None and not _ends(pid, QUIT_S):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            _ends(pid, ASK_S)
        for name in self.environment:
            os.environ.pop(name, None)

    def _ask(self, command: str, timeout_s: float = ASK_S) -> str | None:
        """The answer on the control pipe; None where the daemon does not give one."""
        with suppress(subprocess.TimeoutExpired, OSError):
            done = subprocess.run(
                [PROGRAM], input=f"{command}\n", text=True, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, timeout=timeout_s,
            )  # fmt: skip
            return done.stdout if done.returncode == 0 else None
        return None

    def _pid(self) -> int | None:
        with suppress(OSError, ValueError):
            return int((self.pipes / f"{PROGRAM}.pid").read_text())
        return None

    def _log_tail(self) -> str:
        texts = [file.read_text(errors="replace") for file in sorted(self.logs.glob("*.log"))]
        return "\n".join(texts)[-1000:].strip() or "it says nothing"


def client_environment(thread_percentage: int | None, has_low_priority: bool) -> dict[str, str]:
    """Of one client, set before its CUDA context is made: at most this share of the threads, and level 1,
    `below normal`, which is a hint to the driver."""
    env = {}
    if thread_percentage is not None:
        env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(thread_percentage)
    if has_low_priority:
        env["CUDA_MPS_CLIENT_PRIORITY"] = "1"
    return env


def _group_of(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def _ends(pid: int, timeout_s: float) -> bool:
    """Whether the process, which is no child of ours, has ended within that time."""
    deadline = time.monotonic() + timeout_s
    while _runs(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _runs(pid: int) -> bool:
    """A zombie does not: nobody may be there to reap it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
