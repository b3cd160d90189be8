"""Maps the memory that the export inside vLLM shares: `shm` on a CPU, `cuda_ipc` on a GPU.

A mapping is bytes; `view` cuts typed tensors out of it, without a copy.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
from abc import ABC, abstractmethod

import torch

from apollo_ipc import cuda_driver
from apollo_ipc.errors import AttachError
from apollo_ipc.manifest import Manifest, Segment, View, start_ticks

log = logging.getLogger(__name__)


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

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

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
    """An IPC mapping of each cudaMalloc allocation with weights, on the device with the exporter's UUID.

    Raw handles: torch's own CUDA sharing counts references in the exporter, and the count goes negative when
    one export is opened a second time (worker restart). A device's handles may be opened in one context of
    this process only: the primary one, which torch uses.
    """

    def __init__(self, device_uuid: str | None):
        self._opened: list[int] = []
        self._device = _device_with_uuid(device_uuid)
        torch.cuda.set_device(self._device)
        torch.zeros(1, device=self._device)  # makes the primary context, current in this thread

    @property
    def device(self) -> torch.device:
        return self._device

    def open(self, segment: Segment) -> torch.Tensor:
        if not segment.handle:
            raise AttachError("the manifest's cuda_ipc segment has no handle")
        try:
            with torch.cuda.device(self._device):
                pointer = cuda_driver.open_ipc(bytes.fromhex(segment.handle))
        except (ValueError, cuda_driver.CudaDriverError) as error:
            raise AttachError(
                f"{error}; vLLM and the worker must share the GPU, the user and the IPC namespace of the "
                "container"
            ) from None
        self._opened.append(pointer)
        return _bytes_at(pointer, segment.size_bytes, self._device)

    def close(self) -> None:
        """Waits for the kernels that still write, then unmaps.

        An error of the device raises here, and the process must end: nothing on CUDA works after it. Until
        the mapping is closed it keeps the memory itself, also of an exporter that has died (docs/gpu.md).
        """
        if not self._opened:
            return
        torch.cuda.synchronize(self._device)
        while self._opened:
            try:
                with torch.cuda.device(self._device):
                    cuda_driver.close_ipc(self._opened.pop())
            except cuda_driver.CudaDriverError as error:
                log.warning("a mapping of vLLM's weights was not closed: %s", error)


def _bytes_at(pointer: int, size_bytes: int, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(_DeviceBytes(pointer, size_bytes), device=device)
    assert tensor.data_ptr() == pointer, "torch copied the weights instead of aliasing them"
    return tensor


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
    """Checkpoint tensor name -> live tensor, for every view of the manifest whose tensor is shared.

    A view of a tensor that the export refused is left out. Raises AttachError for a view that reaches outside
    its tensor, a tensor that reaches outside its segment, and a tensor that the manifest does not explain.
    """
    segments = [transport.open(segment) for segment in manifest.segments]
    refused = {refusal.name for refusal in manifest.refused}
    return {
        name: cut(name, view, manifest, segments)
        for name, view in manifest.views.items()
        if view.tensor in manifest.tensors or view.tensor not in refused
    }


def cut(name: str, view: View, manifest: Manifest, segments: list[torch.Tensor]) -> torch.Tensor:
    """The live elements of `view`. Raises AttachError where it reaches outside of its memory."""
    if (shared := manifest.tensors.get(view.tensor)) is None:
        raise AttachError(f"{name}: the manifest has no tensor {view.tensor!r}", refused=[name])
    dtype = getattr(torch, shared.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise AttachError(f"{name}: dtype {shared.dtype} cannot be trained", refused=[name])
    if not 0 <= shared.segment < len(segments):
        raise AttachError(f"{name}: segment {shared.segment} of {len(segments)}", refused=[name])
    if not (_is_sound(shared.shape, shared.stride) and _is_sound(view.shape, view.stride)):
        raise AttachError(f"{name}: shape and stride contradict each other or are negative", refused=[name])
    if shared.offset_bytes < 0 or shared.offset_bytes % dtype.itemsize or view.offset < 0:
        raise AttachError(f"{name}: offset negative or not aligned to {shared.dtype}", refused=[name])
    segment = segments[shared.segment]
    reach = _reach(shared.shape, shared.stride)
    if shared.offset_bytes + reach * dtype.itemsize > segment.numel():
        raise AttachError(f"{name}: {view.tensor} reaches outside its segment", refused=[name])
    if view.offset + _reach(view.shape, view.stride) > reach:
        raise AttachError(f"{name}: the view reaches outside {view.tensor}", refused=[name])
    typed = segment[shared.offset_bytes : shared.offset_bytes + reach * dtype.itemsize].view(dtype)
    return torch.as_strided(typed, view.shape, view.stride, view.offset + typed.storage_offset())


def _is_sound(shape: list[int], stride: list[int]) -> bool:
    """No negative number, and no dimension along which the elements would be one and the same."""
    return len(shape) == len(stride) and all(
        size >= 0 and step >= (1 if size > 1 else 0) for size, step in zip(shape, stride, strict=True)
    )


def _reach(shape: list[int], stride: list[int]) -> int:
    """Elements from the first to the last one of a strided tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


class Exporter:
    """The processes that own the weights, one a rank. Held by pidfds, which no reused pid can confuse."""

    def __init__(self, *manifests: Manifest):
        """Raises AttachError when a manifest is of a process that has ended."""
        self._fds: list[int] = []
        for manifest in manifests:
            try:
                self._fds.append(os.pidfd_open(manifest.pid))
            except OSError as error:
                self.close()
                raise AttachError(_stale(manifest)) from error
            if start_ticks(manifest.pid) != manifest.pid_start_ticks or not self.is_alive():
                self.close()
                raise AttachError(_stale(manifest))

    def is_alive(self, wait_s: float = 0.0) -> bool:
        """Whether all of them are. One system call, cheap enough for once a parameter. A killed process is
        alive until the kernel has torn down its memory; wait_s: how long to wait for that."""
        return not select.select(self._fds, [], [], wait_s)[0]

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _stale(manifest: Manifest) -> str:
    return (
        f"the weights manifest is of an earlier vLLM (boot {manifest.boot_id[:8]}, pid {manifest.pid}), "
        "which has ended; waiting for the next one"
    )
