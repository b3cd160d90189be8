"""The two ways of sharing memory that vLLM owns: a memfd on a CPU, CUDA IPC handles on a GPU."""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Iterator

import torch
from torch import nn

from apollo_ipc import cuda_driver
from apollo_ipc.manifest import Refusal, Segment

ALIGN_BYTES = 64  # a cache line, and what vectorised kernels like best


@dataclasses.dataclass
class SharedMemory:
    """What was shared. `addresses`: (first byte's address, size, segment index, offset in the segment)."""

    transport: str
    device_uuid: str | None
    segments: list[Segment]
    addresses: list[tuple[int, int, int, int]]
    refused: list[Refusal]
    keep: object = None

    def place(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """(segment, offset in bytes) of the tensor's first element, or None where it is not shared."""
        address = tensor.data_ptr()
        for start, size, segment, offset in self.addresses:
            if start <= address < start + size:
                return segment, offset + address - start
        return None


def _module_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module holds: parameters, buffers and plain attributes."""
    for prefix, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}".lstrip("."), value


def share_cpu(model: nn.Module) -> SharedMemory:
    """Moves every parameter's storage into one memfd, in place: each tensor object stays, its memory moves.

    Tied parameters share a storage and stay tied; plain tensors that alias a parameter move with it.
    The memfd leaves nothing behind and outlives this process for as long as a worker maps it.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage
    offsets: dict[int, int] = {}
    total = 0
    for address, storage in storages.items():
        offsets[address] = total
        total += -(-storage.nbytes() // ALIGN_BYTES) * ALIGN_BYTES
    size = max(total, mmap.PAGESIZE)
    fd = os.memfd_create("apollo-weights", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    mapping = mmap.mmap(fd, size)
    arena = torch.frombuffer(mapping, dtype=torch.uint8)
    for address, storage in storages.items():
        source = torch.empty(0, dtype=torch.uint8).set_(storage)
        arena[offsets[address] : offsets[address] + storage.nbytes()].copy_(source)
    moved: set[int] = set()
    for _, tensor in list(_module_tensors(model)):
        address = tensor.untyped_storage().data_ptr()
        if address not in offsets or id(tensor) in moved:
            continue
        moved.add(id(tensor))
        shifted = offsets[address] // tensor.element_size() + tensor.storage_offset()
        tensor.data = torch.as_strided(arena.view(tensor.dtype), tensor.shape, tensor.stride(), shifted)
    base = arena.data_ptr()
    return SharedMemory(
        transport="shm",
        device_uuid=None,
        segments=[Segment(size_bytes=size, path=f"/proc/{os.getpid()}/fd/{fd}")],
        addresses=[(base, size, 0, 0)],
        refused=[],
        keep=(arena, mapping),
    )


def share_cuda(model: nn.Module, vllm_config) -> SharedMemory:
    """One IPC handle per cudaMalloc allocation that holds a parameter; nothing moves (graphs bake addresses).

    Raw handles rather than torch's reductions, whose reference counters go negative when one export is opened
    twice. The driver itself tells where an allocation begins and whether it can be shared: memory of
    `expandable_segments` and of vLLM's cumem allocator is mapped by other means and cannot, and weights
    offloaded to the host are no GPU memory at all. Each is refused by name.
    """
    device = next(model.parameters()).device
    result = SharedMemory("cuda_ipc", str(torch.cuda.get_device_properties(device).uuid), [], [], [])
    # Sleep mode turns the cumem allocator on (vllm/config/model.py), which may also be chosen alone.
    for setting in ("enable_sleep_mode", "enable_cumem_allocator"):
        if getattr(vllm_config.model_config, setting, False):
            flag = f"--{setting.replace('_', '-')}"
            result.refused.append(
                Refusal(flag, "its memory cannot be shared by CUDA IPC; start vLLM without it")
            )
    if result.refused:
        return result
    not_shareable: list[str] = []
    with torch.cuda.device(device):  # the driver answers for the current context
        for name, parameter in model.named_parameters():
            if parameter.numel() == 0 or result.place(parameter) is not None:
                continue
            try:
                kind = cuda_driver.memory_kind(parameter.data_ptr())
                if kind is cuda_driver.Kind.SHAREABLE:
                    _share_allocation(result, parameter)
            except (cuda_driver.CudaDriverError, OSError) as error:  # OSError: no NVIDIA driver, i.e. ROCm
                result.refused.append(Refusal(name, f"the CUDA driver does not share its memory: {error}"))
                continue
            if kind is cuda_driver.Kind.VIRTUAL:
                not_shareable.append(name)
            elif kind is cuda_driver.Kind.HOST:
                reason = (
                    "offloaded to host memory (--cpu-offload-gb and the like); the worker trains on the GPU"
                )
                result.refused.append(Refusal(name, reason, blocks=False))
    if not_shareable:
        result.refused.append(
            Refusal(
                "expandable_segments",
                f"{len(not_shareable)} weights, e.g. {not_shareable[0]}, lie in memory that CUDA IPC cannot "
                "share: remove expandable_segments:True and backend:cudaMallocAsync from PYTORCH_ALLOC_CONF "
                "and PYTORCH_CUDA_ALLOC_CONF",
            )
        )
    return result


def _share_allocation(result: SharedMemory, parameter: torch.Tensor) -> None:
    """Adds the whole allocation around `parameter`: torch cuts many tensors out of one (a "segment")."""
    base, size = cuda_driver.allocation(parameter.data_ptr())
    result.addresses.append((base, size, len(result.segments), 0))
    result.segments.append(Segment(size_bytes=size, handle=cuda_driver.ipc_handle(base).hex()))
