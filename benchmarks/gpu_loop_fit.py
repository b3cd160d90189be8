"""Whether a model fits on this machine, said in a sentence before anything large is made. For gpu_loop.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from gpu_loop_model import RandomModel
from gpu_loop_system import LoopFailed

from apollo_ipc.process.serving import serves_on_cpu

CPU_PROCESSES_BYTES = 5 * 10**9  # assumed: vLLM's and the worker's own memory, vLLM's KV cache of 1 GiB
SPARE_BYTES = 10**9
COPY_PROCESS_BYTES = (
    2 * 10**9
)  # assumed: the CUDA context of a second copy's process, and what torch rounds up


def device_of() -> Literal["cuda", "cpu"]:
    """Where this environment's vLLM computes. Raises LoopFailed where it has no device to do so."""
    import torch

    if serves_on_cpu():
        return "cpu"
    if not torch.cuda.is_available():
        raise LoopFailed("this environment's vLLM is the CUDA build, and there is no CUDA device here")
    return "cuda"


def plan(
    model_dir: Path, utilization: float | None, default: float, env: dict[str, str], beside_bytes: int = 0
) -> tuple[dict[str, Any], float]:
    """What `apollo-ipc plan` says, and vLLM's share. utilization None: `default`, or less where that fits.

    beside_bytes: of a second copy that is to fit beside vLLM's share too, when the worker has ended.
    """
    made = _plan(model_dir, utilization or default, env)
    if utilization is None and not made["fits"] and (largest := made["max_utilization"]):
        made = _plan(model_dir, largest - 0.01, env)
    if utilization is None and beside_bytes and (lack := _lack_of_bytes(made, beside_bytes)) > 0:
        made = _plan(model_dir, made["utilization"] - lack / made["device_bytes"] - 0.01, env)
    return made, made["utilization"]


def _lack_of_bytes(made: dict[str, Any], beside_bytes: int) -> float:
    share_bytes = made["utilization"] * made["device_bytes"]
    return beside_bytes + COPY_PROCESS_BYTES - (made["device_bytes"] - share_bytes)


def _plan(model_dir: Path, utilization: float, env: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "apollo_ipc", "plan", str(model_dir), "--json"]
    command += ["--gpu-memory-utilization", f"{utilization:.2f}"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        raise LoopFailed(f"apollo-ipc plan: {done.stdout} {done.stderr[-1000:]}") from None


def check_memory(made: dict[str, Any], is_gpu: bool, beside_bytes: int = 0) -> None:
    """Raises LoopFailed unless weights, vLLM and training fit together, and vLLM with a second copy."""
    if is_gpu:
        if beside_bytes and _lack_of_bytes(made, beside_bytes) > 0:
            raise LoopFailed(
                f"a second copy of {_gb(beside_bytes)} does not fit on {made['device']} "
                f"({_gb(made['device_bytes'])}) beside vLLM's share of {made['utilization']:.2f}"
            )
        if not made["fits"]:
            largest = made["max_utilization"]
            would = f"--gpu-memory-utilization {largest:g} would" if largest else "no share of vLLM's would"
            raise LoopFailed(
                f"this preset does not fit on {made['device']} ({_gb(made['device_bytes'])}): vLLM's share "
                f"is {_gb(made['vllm_bytes'])} and training needs {_gb(made['trainer_bytes'])}; {would} do"
            )
        return
    weights = made["vllm"][0]["bytes"]  # "weights, served and trained"
    needed = weights + made["trainer_bytes"] + CPU_PROCESSES_BYTES
    if needed > (available := _available_bytes()):
        raise LoopFailed(
            f"this preset does not fit into this machine's memory: {_gb(weights)} of weights, "
            f"{_gb(made['trainer_bytes'])} for training and about {_gb(CPU_PROCESSES_BYTES)} for the "
            f"processes, with {_gb(available)} available"
        )


def check_disk(model: RandomModel) -> None:
    """Raises LoopFailed unless the weights fit where they are to be written."""
    free = shutil.disk_usage(model.directory).free
    if not model.is_written and free < model.num_bytes + SPARE_BYTES:
        raise LoopFailed(
            f"the weights take {_gb(model.num_bytes)}, and {model.directory} has {_gb(free)} free: name "
            "another place with --dir or --model-dir (/dev/shm is memory)"
        )


def room_for_sync(model: RandomModel, kind: str) -> str | None:
    """Why a sync of this kind would not fit on the disk; None where it does.

    A full one writes every shard beside the old ones. A delta is at most half of them (a fifth is usual).
    """
    free = shutil.disk_usage(model.directory).free
    needed = SPARE_BYTES + (model.num_bytes if kind == "full" else model.num_bytes // 2)
    return None if free >= needed else f"{_gb(needed)} are needed on the disk, {_gb(free)} are free"


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
