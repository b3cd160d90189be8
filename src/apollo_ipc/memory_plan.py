"""What `apollo-ipc plan` says: made by apollo_worker.commands.memory_plan, in a process of its own; the
command line and the page show it."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from apollo_ipc.errors import ApolloError

VLLM_UTILIZATION = 0.92  # vLLM's default: gpu_memory_utilization in vllm/config/cache.py


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


def plan_command(request: dict[str, Any]) -> list[str]:
    """request: the fields of apollo_worker.commands.memory_plan.Request."""
    text = msgspec.json.encode(request).decode()
    return [sys.executable, "-m", "apollo_worker.commands.memory_plan", text]


def read_plan(printed: bytes, status: int) -> MemoryPlan:
    """What that command printed. Raises ApolloError with what it said and its exit status."""
    answer = msgspec.json.decode(printed) if printed else {}
    if status == 0:
        return msgspec.convert(answer, MemoryPlan)
    told = answer.get("error") or {
        "message": "the plan ended early; what it said is above",
        "code": "plan_failed",
    }
    error = ApolloError(**told)
    error.exit_code = status if status > 0 else 1
    raise error
