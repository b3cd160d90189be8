"""vLLM as several processes: what its ranks agree on, and what one worker cannot reach of them."""

from __future__ import annotations

import multiprocessing
import uuid
from typing import Any

from apollo_ipc.manifest import Refusal


def shared_boot_id(parallel: Any) -> str:
    """A new id, the same one in each rank of this vLLM. Every rank must call it: it waits for all."""
    own = uuid.uuid4().hex
    if parallel.world_size == 1:
        return own
    from vllm.distributed.parallel_state import get_world_group

    found = get_world_group().broadcast_object(own, src=0)
    assert isinstance(found, str)
    return found


def unsupported_ranks(parallel: Any) -> list[Refusal]:
    """Ways of being several processes in which one worker cannot hold all that is served."""
    found = []
    if is_data_parallel(parallel):
        reason = "each engine has a copy of the weights of its own; live training reaches one"
        found.append(Refusal("--data-parallel-size", reason))
    if getattr(parallel, "pipeline_parallel_size", 1) > 1:
        reason = "live training was not tried with it; split the weights by --tensor-parallel-size"
        found.append(Refusal("--pipeline-parallel-size", reason))
    if getattr(parallel, "nnodes", 1) > 1:
        reason = "the worker reaches the memory of processes on its own machine only"
        found.append(Refusal("--nnodes", reason))
    if getattr(parallel, "enable_eplb", False):
        reason = "vLLM moves experts between its processes while it serves"
        found.append(Refusal("--enable-eplb", reason))
    return found


def is_data_parallel(parallel: Any) -> bool:
    """Whether this engine is one of several with the same weights.

    A dense model's engine is told that it is alone (`reconfigure_for_independent_dp_rank` in
    vllm/config/parallel.py, called from v1/engine/core.py): size 1, rank 0. What stays are the index, the
    ports and the elastic size that were found before, and the name that the process was given.
    """
    return (
        parallel.data_parallel_size > 1
        or getattr(parallel, "data_parallel_index", 0) > 0
        or (getattr(parallel, "elastic_ep_max_dp_size", None) or 1) > 1
        or bool(getattr(parallel, "_data_parallel_master_port_list", None))
        or multiprocessing.current_process().name.startswith("EngineCore_DP")
    )
