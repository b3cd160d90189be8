"""The five calls of the CUDA driver that sharing GPU memory needs, by ctypes. Importable without CUDA.

The driver's C interface never changes under a name; NVIDIA's Python package does: from cuda-bindings 13.4 on
an IPC handle has no `reserved`, so its 64 bytes can be neither read nor set, and `cuda.bindings.runtime`
brings a second CUDA runtime into the process. The calls act in the calling thread's current context, which
torch makes current at its first use of a device. Signatures and numbers: cuda.h, CUDA 11.0 and later.
"""

from __future__ import annotations

import ctypes
import enum
import functools

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_LIBRARY = "libcuda.so.1"
_LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag that there is
_MEMORY_TYPE, _IS_LEGACY_CUDA_IPC_CAPABLE = 2, 10  # CU_POINTER_ATTRIBUTE_...
_MEMORYTYPE_DEVICE = 2  # CU_MEMORYTYPE_DEVICE


class CudaDriverError(Exception):
    """A call of the driver failed; the message is `call: CUDA_ERROR_...`."""


class Kind(enum.Enum):
    """What memory an address lies in, as far as sharing goes."""

    SHAREABLE = "device memory of cudaMalloc"
    VIRTUAL = "device memory of another kind: a virtual-memory mapping or a stream-ordered pool"
    HOST = "host memory"


class _IpcMemHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    address, out = ctypes.c_uint64, ctypes.POINTER  # CUdeviceptr is an unsigned long long
    signatures = {
        "cuGetErrorName": (ctypes.c_int, out(ctypes.c_char_p)),
        "cuPointerGetAttribute": (ctypes.c_void_p, ctypes.c_int, address),
        "cuMemGetAddressRange_v2": (out(address), out(ctypes.c_size_t), address),
        "cuIpcGetMemHandle": (out(_IpcMemHandle), address),
        "cuIpcOpenMemHandle_v2": (out(address), _IpcMemHandle, ctypes.c_uint),  # the handle by value
        "cuIpcCloseMemHandle": (address,),
    }
    for name, argtypes in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argtypes, ctypes.c_int
    return library


def _call(name: str, *arguments) -> None:
    if result := getattr(_driver(), name)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(text))
        raise CudaDriverError(f"{name}: {(text.value or b'unknown error').decode()} ({result})")


def _attribute(which: int, address: int) -> int:
    """0 for an address that the driver does not know, e.g. ordinary host memory."""
    value = ctypes.c_int(0)
    try:
        _call("cuPointerGetAttribute", ctypes.byref(value), which, address)
    except CudaDriverError:
        return 0
    return value.value


def memory_kind(address: int) -> Kind:
    if _attribute(_MEMORY_TYPE, address) != _MEMORYTYPE_DEVICE:
        return Kind.HOST
    return Kind.SHAREABLE if _attribute(_IS_LEGACY_CUDA_IPC_CAPABLE, address) else Kind.VIRTUAL


def allocation(address: int) -> tuple[int, int]:
    """(base, size in bytes) of the device allocation that holds `address`. Raises CudaDriverError."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    return base.value, size.value


def ipc_handle(base: int) -> bytes:
    """The 64 bytes by which another process opens the allocation that starts at `base`. May be called again.

    Raises CudaDriverError.
    """
    handle = _IpcMemHandle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return bytes(handle.reserved)


def open_ipc(handle: bytes) -> int:
    """Where another process's allocation begins here. Each open needs a `close_ipc`. Raises CudaDriverError.

    Not in the process that exported it: the driver refuses that.
    """
    if len(handle) != HANDLE_BYTES:
        raise CudaDriverError(f"an IPC handle has {HANDLE_BYTES} bytes, this one {len(handle)}")
    address = ctypes.c_uint64()
    by_value = _IpcMemHandle.from_buffer_copy(handle)
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), by_value, _LAZY_ENABLE_PEER_ACCESS)
    return address.value


def close_ipc(address: int) -> None:
    """Unmaps what `open_ipc` returned. Raises CudaDriverError."""
    _call("cuIpcCloseMemHandle", address)
