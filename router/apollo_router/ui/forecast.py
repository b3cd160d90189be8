"""What `apollo-ipc plan` forecasts for the served model as it is configured, beside what is used."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess

from apollo_ipc.errors import NotReady
from apollo_ipc.manifest import Manifest, read_manifest
from apollo_ipc.memory_plan import VLLM_UTILIZATION, MemoryPlan, plan_command, read_plan
from apollo_router.gateway import Gateway

TIMEOUT_S = 300.0


class Forecast:
    """Computed once a start of vLLM, in a process that yields to serving: some ten seconds of a core."""

    def __init__(self) -> None:
        self._made: tuple[str, MemoryPlan] | None = None
        self._making = asyncio.Lock()

    async def get(self, gateway: Gateway) -> MemoryPlan:
        """Raises NotReady before vLLM has shared its weights, ApolloError where the plan fails."""
        async with self._making:
            manifest = await asyncio.to_thread(read_manifest, gateway.config.runtime_dir)
            if manifest is None:
                raise NotReady("vLLM has not shared its weights yet")
            if self._made is None or self._made[0] != manifest.boot_id:
                self._made = manifest.boot_id, await _run(gateway, manifest)
            return self._made[1]


async def _run(gateway: Gateway, manifest: Manifest) -> MemoryPlan:
    request = {
        "model_dir": manifest.model_path,
        "options": gateway.config.train,
        "utilization": VLLM_UTILIZATION,
        "device_bytes": _device_bytes() if manifest.transport == "cuda_ipc" else None,
    }
    # Not torch's word in the child: it would take a CUDA context's memory to ask.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    yielding = [nice, "-n", "19"] if (nice := shutil.which("nice")) else []
    process = await asyncio.create_subprocess_exec(
        *yielding, *plan_command(request), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    try:
        printed, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return read_plan(printed, process.returncode)


def _device_bytes() -> int:
    from vllm.platforms import current_platform

    return current_platform.get_device_total_memory()  # by NVML: no context either
