"""The process that holds the second copy, seen from outside, and its updates. For gpu_transfer.py."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_loop_fit import device_of
from gpu_loop_system import LoopFailed

COPY_S, UPDATE_S, END_S = 1800.0, 600.0, 30.0  # at most: loading the copy; one update; ending
RAY_FREE = (0, 27)  # the first vLLM whose ipc_engine.py does not import ray


@dataclasses.dataclass(frozen=True)
class Peer:
    """A backend of vLLM's weight transfer: its name there, and the script that sends."""

    backend: str
    script: Path
    env: dict[str, str] = dataclasses.field(default_factory=dict)  # of vLLM

    @property
    def flags(self) -> list[str]:
        return ["--weight-transfer-config", json.dumps({"backend": self.backend})]


def ipc_peer(base: Path) -> Peer:
    """vLLM's own. Raises LoopFailed where it cannot work here."""
    if device_of() != "cuda":
        raise LoopFailed(
            "this environment's vLLM computes on the CPU, and no backend of its weight transfer does: the "
            "peer needs a CUDA device"
        )
    # /pause, /update_weights and the like; and handles over HTTP, which vLLM wants as a pickle.
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    if needs_ray() and importlib.util.find_spec("ray") is None:
        env["PYTHONPATH"] = os.pathsep.join([str(empty_ray(base)), os.environ.get("PYTHONPATH", "")])
    return Peer("ipc", Path(__file__).with_name("gpu_transfer_sender.py"), env)


def needs_ray() -> bool:
    """0.26's ipc_engine.py imports ray at its head, which is no dependency of vLLM."""
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("vllm")
        return tuple(int(part) for part in version.split(".")[:2]) < RAY_FREE
    return False


def empty_ray(base: Path) -> Path:
    """A directory with a module `ray` of nothing. That file uses ray only where handles are sent by it, which
    is not done here; vLLM's other files take a module without `is_initialized` for no ray (vllm/ray)."""
    directory = base / "empty-ray"
    directory.mkdir()
    (directory / "ray.py").touch()
    return directory


class Sender:
    """The sending process, for the length of a `with` block. It answers in lines of JSON."""

    def __init__(self, peer: Peer, model_dir: Path, url: str, pause: str, env: dict[str, str], log: Path):
        self._command = [sys.executable, str(peer.script), str(model_dir), url, pause]
        self._env, self._log = env, log
        self._answers: queue.Queue[str | None] = queue.Queue()
        self.copy: dict[str, Any] = {}

    def __enter__(self) -> Sender:
        """Returns when the copy is loaded."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._read, name="sender", daemon=True).start()
        try:
            self.copy = self._answer(COPY_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    @property
    def pid(self) -> int:
        return self._process.pid

    def update(self) -> dict[str, float]:
        """Seconds of each part of one update, `total_s` and, from the pause to the end of it, `held_s`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its answer says why
            self._process.stdin.write("update\n")
            self._process.stdin.flush()
        return self._answer(UPDATE_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise LoopFailed(f"the sender has not answered within {timeout_s:.0f} s") from None
        if line is None:
            self._answers.put(None)
            raise LoopFailed(f"the sender ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)

    def _end(self) -> None:
        """At the end of its input it lets go of the copy and ends."""
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Updates:
    """`num` updates, evenly over so many seconds, in a thread; all end before the `with` block does."""

    def __init__(self, sender: Sender, num: int, seconds: float):
        self._sender, self._num, self._seconds = sender, num, seconds
        self.done: list[dict[str, float]] = []
        self._error: LoopFailed | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="updates", daemon=True)

    def __enter__(self) -> Updates:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._stop.set()
        self._thread.join(self._seconds + self._num * UPDATE_S)
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        started = time.monotonic()
        try:
            for number in range(1, self._num + 1):
                at = started + number * self._seconds / (self._num + 1)
                if self._stop.wait(max(0.0, at - time.monotonic())):
                    return
                self.done.append(self._sender.update())
        except LoopFailed as error:
            self._error = error
