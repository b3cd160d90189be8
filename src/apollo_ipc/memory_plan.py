"""What `apollo-ipc plan` says: made by apollo_worker.commands.memory_plan, shown by the command line."""

from __future__ import annotations

import msgspec


class Item(msgspec.Struct, frozen=True):
    name: str
    bytes: int
    note: str = ""


class MemoryPlan(msgspec.Struct, frozen=True):
    """vllm, trainer: what adds up to `vllm_bytes` and `trainer_bytes`; step: the parts of one step, which are
    not all alive at the same moment. max_utilization: the largest share of vLLM's beside which training
    fits, None where there is none."""

    model: str
    dtype: str
    num_parameters: int
    device: str
    device_bytes: int
    utilization: float
    vllm: list[Item]
    trainer: list[Item]
    step: list[Item]
    vllm_bytes: int
    trainer_bytes: int
    total_bytes: int
    fits: bool
    max_utilization: float | None
    assumptions: list[str]
