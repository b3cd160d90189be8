"""The two ways of sharing memory that vLLM owns: a memfd on a CPU, CUDA IPC handles on a GPU."""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Iterator

import torch
from torch import nn

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
    """One cudaIpcMemHandle per cudaMalloc segment that holds a parameter; nothing moves (graphs bake addresses).

    Raw handles by NVIDIA's cuda.bindings rather than torch's reductions, whose reference counters go negative
    when one export is opened twice. Segments from `expandable_segments` or from vLLM's sleep-mode allocator are
    virtual-memory mappings, which cudaIpcGetMemHandle cannot export: refused by name.
    """
    from cuda.bindings import runtime

    device = next(model.parameters()).device
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    result = SharedMemory("cuda_ipc", uuid, [], [], [])
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        result.refused.append(
            Refusal("--enable-sleep-mode", "its memory cannot be shared by CUDA IPC; start vLLM without it")
        )
        return result
    snapshot = [s for s in torch.cuda.memory_snapshot() if s["device"] == device.index]
    found: dict[int, int] = {}  # segment base -> index in result.segments
    for name, parameter in model.named_parameters():
        address = parameter.data_ptr()
        if not address or parameter.numel() == 0:
            continue
        segment = next(
            (s for s in snapshot if s["address"] <= address < s["address"] + s["total_size"]), None
        )
        if segment is None:
            result.refused.append(
                Refusal(name, "not in memory of torch's CUDA allocator (cumem, UVA or offload)", False)
            )
            continue
        if segment.get("is_expandable"):
            result.refused.append(
                Refusal(
                    name,
                    "in an expandable segment, which CUDA IPC cannot share: remove expandable_segments:True "
                    "from PYTORCH_CUDA_ALLOC_CONF / PYTORCH_ALLOC_CONF",
                )
            )
            continue
        base = segment["address"]
        if base in found:
            continue
        error, handle = runtime.cudaIpcGetMemHandle(base)
        if error != runtime.cudaError_t.cudaSuccess:
            result.refused.append(Refusal(name, f"cudaIpcGetMemHandle: {error.name}"))
            continue
        found[base] = len(result.segments)
        result.segments.append(Segment(size_bytes=segment["total_size"], handle=bytes(handle.reserved).hex()))
        result.addresses.append((base, segment["total_size"], found[base], 0))
    return result
