"""Maps the memory that the export inside vLLM shares: `shm` on a CPU, `cuda_ipc` on a GPU.

A mapping is bytes; `view` cuts typed tensors out of it, without a copy.
"""

from __future__ import annotations

import mmap
import os
import select
from abc import ABC, abstractmethod

import torch

from apollo_ipc.errors import AttachError
from apollo_ipc.manifest import Manifest, Segment, SharedTensor, View, start_ticks


class Transport(ABC):
    """Opened segments of one manifest. After `close` no tensor that came from here may be touched."""

    @abstractmethod
    def open(self, segment: Segment) -> torch.Tensor:
        """The segment as a uint8 tensor of `size_bytes`. Raises AttachError."""

    @abstractmethod
    def close(self) -> None: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...


class SharedMemoryTransport(Transport):
    """memfd of the exporter, opened through /proc/PID/fd/N: same user only, and nothing left behind."""

    device = torch.device("cpu")

    def open(self, segment: Segment) -> torch.Tensor:
        if not segment.path:
            raise AttachError("the manifest's shm segment has no path")
        try:
            fd = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise AttachError(
                f"cannot open vLLM's weights at {segment.path}: {error.strerror}; the worker must run as "
                "vLLM's user, in the same container, and see its /proc"
            ) from None
        try:
            if (size := os.fstat(fd).st_size) < segment.size_bytes:
                raise AttachError(
                    f"{segment.path} holds {size} bytes, the manifest says {segment.size_bytes}"
                )
            # The tensor keeps the mmap object alive, and with it the memory.
            return torch.frombuffer(mmap.mmap(fd, segment.size_bytes), dtype=torch.uint8)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Unmapped when the last tensor is dropped."""


class CudaIpcTransport(Transport):
    """cudaIpcOpenMemHandle per cudaMalloc segment, on the device with the exporter's UUID.

    Raw handles: torch's own CUDA sharing counts references in the exporter, and the count goes negative when
    one export is opened a second time (worker restart). A CUDA IPC mapping must not be opened twice in one
    process and must be closed before the exporter frees it.
    """

    def __init__(self, device_uuid: str | None):
        from cuda.bindings import runtime

        self._runtime = runtime
        self._opened: list[int] = []
        self._device = _device_with_uuid(device_uuid)
        torch.cuda.init()
        torch.cuda.set_device(self._device)
        torch.zeros(1, device=self._device)  # makes the primary context that the handles are opened in

    @property
    def device(self) -> torch.device:
        return self._device

    def open(self, segment: Segment) -> torch.Tensor:
        if not segment.handle:
            raise AttachError("the manifest's cuda_ipc segment has no handle")
        handle = self._runtime.cudaIpcMemHandle_t()
        handle.reserved = bytes.fromhex(segment.handle)
        error, pointer = self._runtime.cudaIpcOpenMemHandle(
            handle, self._runtime.cudaIpcMemLazyEnablePeerAccess
        )
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise AttachError(
                f"cudaIpcOpenMemHandle: {error.name}; vLLM and the worker must share the GPU, the user and "
                "the IPC namespace of the container"
            )
        self._opened.append(int(pointer))
        return torch.as_tensor(_DeviceBytes(int(pointer), segment.size_bytes), device=self._device)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        for pointer in self._opened:
            self._runtime.cudaIpcCloseMemHandle(pointer)
        self._opened.clear()


class _DeviceBytes:
    """`__cuda_array_interface__` (version 3) of `size_bytes` bytes at `pointer`."""

    def __init__(self, pointer: int, size_bytes: int):
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def _device_with_uuid(device_uuid: str | None) -> torch.device:
    """By UUID: the two processes may number their GPUs differently (CUDA_VISIBLE_DEVICES)."""
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if device_uuid not in uuids:
        raise AttachError(
            f"vLLM's GPU {device_uuid} is not visible here (visible: {', '.join(uuids) or 'none'}); "
            "give the worker the same CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", uuids.index(device_uuid))


def open_transport(manifest: Manifest) -> Transport:
    """Raises AttachError for a transport that this worker does not know or a GPU that it does not see."""
    if manifest.transport == "shm":
        return SharedMemoryTransport()
    if manifest.transport == "cuda_ipc":
        return CudaIpcTransport(manifest.device_uuid)
    raise AttachError(f"the manifest's transport {manifest.transport!r} is not known here (shm, cuda_ipc)")


def map_views(manifest: Manifest, transport: Transport) -> dict[str, torch.Tensor]:
    """Checkpoint tensor name -> live tensor, for every view of the manifest.

    Raises AttachError for a view that reaches outside its tensor or a tensor that reaches outside its segment.
    """
    segments = [transport.open(segment) for segment in manifest.segments]
    return {
        name: _cut(name, view, _tensor_of(name, view, manifest), segments)
        for name, view in manifest.views.items()
    }


def _tensor_of(name: str, view: View, manifest: Manifest) -> SharedTensor:
    if (shared := manifest.tensors.get(view.tensor)) is None:
        raise AttachError(f"{name}: the manifest has no tensor {view.tensor!r}", refused=[name])
    return shared


def _cut(name: str, view: View, shared: SharedTensor, segments: list[torch.Tensor]) -> torch.Tensor:
    dtype = getattr(torch, shared.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise AttachError(f"{name}: dtype {shared.dtype} cannot be trained", refused=[name])
    if not 0 <= shared.segment < len(segments):
        raise AttachError(f"{name}: segment {shared.segment} of {len(segments)}", refused=[name])
    segment = segments[shared.segment]
    reach = _reach(shared.shape, shared.stride)
    if shared.offset_bytes < 0 or shared.offset_bytes + reach * dtype.itemsize > segment.numel():
        raise AttachError(f"{name}: {view.tensor} reaches outside its segment", refused=[name])
    if min(view.stride, default=0) < 0 or view.offset < 0:
        raise AttachError(f"{name}: negative stride or offset", refused=[name])
    if view.offset + _reach(view.shape, view.stride) > reach:
        raise AttachError(f"{name}: the view reaches outside {view.tensor}", refused=[name])
    typed = segment[shared.offset_bytes : shared.offset_bytes + reach * dtype.itemsize].view(dtype)
    return torch.as_strided(typed, view.shape, view.stride, view.offset + typed.storage_offset())


def _reach(shape: list[int], stride: list[int]) -> int:
    """Elements from the first to the last one of a strided tensor, both included."""
    if any(size <= 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


class Exporter:
    """The process that owns the weights. Held by a pidfd, which cannot be confused by a reused pid."""

    def __init__(self, manifest: Manifest):
        """Raises AttachError when the manifest is of a process that has ended."""
        self.pid = manifest.pid
        try:
            self._fd = os.pidfd_open(manifest.pid)
        except OSError as error:
            raise AttachError(_stale(manifest)) from error
        if start_ticks(manifest.pid) != manifest.pid_start_ticks or not self.is_alive():
            os.close(self._fd)
            raise AttachError(_stale(manifest))

    def is_alive(self) -> bool:
        """One system call, cheap enough for once a parameter."""
        return not select.select([self._fd], [], [], 0)[0]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _stale(manifest: Manifest) -> str:
    return (
        f"the weights manifest is of an earlier vLLM (boot {manifest.boot_id[:8]}, pid {manifest.pid}), which "
        "has ended; waiting for the next one"
    )
