"""The CUDA path without a GPU: the calls against a stub of the driver, and both ends with a driver in memory.

What only a device can show is in tests/gpu.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from types import SimpleNamespace

import msgspec
import pytest
import torch
from apollo_router.memory import share_cuda
from apollo_worker.model import mapping
from apollo_worker.model.mapping import CudaIpcTransport, map_views
from served_model import SLEEPLESS, make_manifest
from torch import nn

from apollo_ipc import cuda_driver
from apollo_ipc.cuda_driver import HANDLE_BYTES, CudaDriverError, Kind
from apollo_ipc.errors import AttachError
from apollo_ipc.manifest import View

# Signatures as cuda.h has them. The handle is passed to Open by value: the 64 bytes lie on the stack.
STUB = r"""
#include <stddef.h>
#include <string.h>
typedef unsigned long long CUdeviceptr;
typedef struct { char reserved[64]; } CUipcMemHandle;
int cuGetErrorName(int error, const char **text) {
    *text = error == 1 ? "CUDA_ERROR_INVALID_VALUE" : NULL; return error == 1 ? 0 : 1; }
int cuPointerGetAttribute(void *data, int attribute, CUdeviceptr address) {
    if (address >= 0x5000) return 1;
    if (attribute == 2) *(unsigned *)data = address >= 0x3000 ? 1 : 2;     /* memory type: host, device */
    else if (attribute == 10) *(_Bool *)data = address < 0x2000;            /* one byte, as a driver may */
    else return 1;
    return 0; }
int cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    if (address >= 0x5000) return 1;
    *base = 0xf00000001000ULL; *size = (size_t)1 << 40; return 0; }
int cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    if (address == 0) return 999;
    for (int i = 0; i < 64; i++) handle->reserved[i] = (char)(i * 5 % 7 ? i + (int)address : 0);
    return 0; }
int cuIpcOpenMemHandle_v2(CUdeviceptr *out, CUipcMemHandle handle, unsigned flags) {
    CUipcMemHandle expected;
    cuIpcGetMemHandle(&expected, 0xf0);
    if (flags != 1 || memcmp(&handle, &expected, 64)) return 1;
    *out = 0xf00000002000ULL; return 0; }
int cuIpcCloseMemHandle(CUdeviceptr address) { return address == 0xf00000002000ULL ? 0 : 1; }
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stub of the driver")
    directory = tmp_path_factory.mktemp("stub")
    (directory / "stub.c").write_text(STUB)
    library = str(directory / "libcuda-stub.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, str(directory / "stub.c")], check=True)
    return library


@pytest.fixture
def driver(stub, monkeypatch):
    monkeypatch.setattr(cuda_driver, "_LIBRARY", stub)
    cuda_driver._driver.cache_clear()
    yield
    cuda_driver._driver.cache_clear()


def test_a_handle_of_64_bytes_travels_whole_zeros_included(driver):
    handle = cuda_driver.ipc_handle(0xF0)
    assert len(handle) == HANDLE_BYTES
    assert handle[0] == 0
    assert handle[62] == (62 + 0xF0) % 256
    assert cuda_driver.open_ipc(bytes.fromhex(handle.hex())) == 0xF00000002000  # above 32 bits
    cuda_driver.close_ipc(0xF00000002000)


def test_a_changed_handle_is_an_error_with_the_drivers_name_for_it(driver):
    handle = bytearray(cuda_driver.ipc_handle(0xF0))
    handle[63] ^= 1
    with pytest.raises(CudaDriverError, match=r"cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_VALUE \(1\)"):
        cuda_driver.open_ipc(bytes(handle))
    with pytest.raises(CudaDriverError, match="64 bytes, this one 63"):
        cuda_driver.open_ipc(bytes(handle[:63]))
    with pytest.raises(CudaDriverError, match=r"cuIpcGetMemHandle: unknown error \(999\)"):
        cuda_driver.ipc_handle(0)


def test_the_allocation_around_an_address(driver):
    assert cuda_driver.allocation(0x1000) == (0xF00000001000, 2**40)
    with pytest.raises(CudaDriverError, match="cuMemGetAddressRange_v2"):
        cuda_driver.allocation(0x5000)


@pytest.mark.parametrize(
    ("address", "kind"),
    [(0x1000, Kind.SHAREABLE), (0x2000, Kind.VIRTUAL), (0x3000, Kind.HOST), (0x5000, Kind.HOST)],
)
def test_the_kind_of_memory_at_an_address(driver, address, kind):
    assert cuda_driver.memory_kind(address) is kind


def test_the_module_needs_no_driver_to_be_imported(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libcuda-that-is-not-there.so.1")
    cuda_driver._driver.cache_clear()
    with pytest.raises(OSError, match="libcuda-that-is-not-there"):
        cuda_driver.allocation(0)


# --- both ends, with host memory in the role of the GPU's ---


class HostDriver:
    """cuda_driver's functions over tensors: each tensor of `allocations` is one cudaMalloc."""

    Kind, CudaDriverError = Kind, CudaDriverError

    def __init__(self, *allocations: torch.Tensor):
        self.allocations = allocations
        self.virtual: list[torch.Tensor] = []
        self.open: list[int] = []
        self.fails = False

    def _find(self, tensors, address):
        for index, tensor in enumerate(tensors):
            if tensor.data_ptr() <= address < tensor.data_ptr() + tensor.nbytes:
                return index
        return None

    def memory_kind(self, address):
        if self._find(self.virtual, address) is not None:
            return Kind.VIRTUAL
        return Kind.HOST if self._find(self.allocations, address) is None else Kind.SHAREABLE

    def allocation(self, address):
        if self.fails:
            raise CudaDriverError("cuMemGetAddressRange_v2: CUDA_ERROR_INVALID_CONTEXT (201)")
        tensor = self.allocations[self._find(self.allocations, address)]
        return tensor.data_ptr(), tensor.nbytes

    def ipc_handle(self, base):
        return self._find(self.allocations, base).to_bytes(HANDLE_BYTES, "little")

    def open_ipc(self, handle):
        index = int.from_bytes(handle, "little")
        if index >= len(self.allocations):
            raise CudaDriverError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_VALUE (1)")
        self.open.append(self.allocations[index].data_ptr())
        return self.open[-1]

    def close_ipc(self, address):
        self.open.remove(address)


def host_bytes(pointer: int, size: int, device: torch.device) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(pointer), dtype=torch.uint8)


class Weights(nn.Module):
    """Two weights in one allocation and one in another, as torch's caching allocator places them."""

    def __init__(self):
        super().__init__()
        self.segments = [torch.zeros(4096, dtype=torch.uint8), torch.zeros(2048, dtype=torch.uint8)]
        for name, segment, start, shape in (
            ("a", 0, 512, (8, 16)),
            ("b", 0, 1024, (32,)),
            ("c", 1, 0, (4, 4)),
        ):
            size = 2 * torch.Size(shape).numel()
            data = self.segments[segment][start : start + size].view(torch.bfloat16).view(shape)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))


@pytest.fixture
def weights() -> Weights:
    return Weights()


@pytest.fixture
def host_driver(weights, monkeypatch) -> HostDriver:
    driver = HostDriver(*weights.segments)
    monkeypatch.setattr("apollo_router.memory.cuda_driver", driver)
    monkeypatch.setattr(mapping, "cuda_driver", driver)
    monkeypatch.setattr(mapping, "_bytes_at", host_bytes)
    monkeypatch.setattr(mapping, "_device_with_uuid", lambda uuid: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-of-the-test")
    )
    return driver


def manifest_of(weights: Weights, tmp_path, memory):
    views = {f"hf.{n}": View(n, list(p.shape), list(p.stride()), 0) for n, p in weights.named_parameters()}
    return make_manifest(tmp_path, dict(weights.named_parameters()), memory, views, [])


def test_one_handle_per_allocation_and_every_view_lands_on_its_weight(weights, host_driver, tmp_path):
    memory = share_cuda(weights, SLEEPLESS)
    assert [segment.size_bytes for segment in memory.segments] == [4096, 2048]
    assert memory.device_uuid == "GPU-of-the-test"
    assert not memory.refused
    manifest = manifest_of(weights, tmp_path, memory)
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=type(manifest)) == manifest
    transport = CudaIpcTransport(manifest.device_uuid)
    views = map_views(manifest, transport)
    for name, parameter in weights.named_parameters():
        views[f"hf.{name}"].fill_(3.0)
        assert views[f"hf.{name}"].data_ptr() == parameter.data_ptr()
        assert torch.equal(parameter, torch.full_like(parameter, 3.0))
    assert int((weights.segments[0] != 0).sum()) == 2 * (8 * 16 + 32)  # 3.0 is 0x4040: two bytes each
    del views
    transport.close()
    assert host_driver.open == []


def test_a_failing_open_closes_what_was_opened(weights, host_driver, tmp_path):
    manifest = manifest_of(weights, tmp_path, share_cuda(weights, SLEEPLESS))
    bad = msgspec.structs.replace(manifest.segments[1], handle="ff" * HANDLE_BYTES)
    manifest = msgspec.structs.replace(manifest, segments=[manifest.segments[0], bad])
    transport = CudaIpcTransport(manifest.device_uuid)
    with pytest.raises(AttachError, match=r"CUDA_ERROR_INVALID_VALUE.*must share the GPU"):
        map_views(manifest, transport)
    assert len(host_driver.open) == 1
    transport.close()
    assert host_driver.open == []


@pytest.mark.parametrize("handle", [None, "not hex", "zz"])
def test_a_handle_that_is_none_is_refused(host_driver, handle):
    from apollo_ipc.manifest import Segment

    with pytest.raises(AttachError):
        CudaIpcTransport("GPU-of-the-test").open(Segment(size_bytes=16, handle=handle))


def test_memory_that_cannot_be_shared_blocks_and_is_named(weights, host_driver):
    host_driver.virtual.append(weights.segments[1])
    memory = share_cuda(weights, SLEEPLESS)
    assert len(memory.segments) == 1
    (refusal,) = memory.refused
    assert refusal.name == "expandable_segments"
    assert refusal.blocks
    assert "1 weights, e.g. c," in refusal.reason


def test_an_offloaded_weight_is_named_and_blocks_only_who_needs_it(weights, host_driver):
    host_driver.allocations = host_driver.allocations[:1]
    memory = share_cuda(weights, SLEEPLESS)
    assert [(r.name, r.blocks) for r in memory.refused] == [("c", False)]
    assert "--cpu-offload-gb" in memory.refused[0].reason
    assert memory.place(weights.c) is None


@pytest.mark.parametrize(
    ("setting", "flag"),
    [("enable_sleep_mode", "--enable-sleep-mode"), ("enable_cumem_allocator", "--enable-cumem-allocator")],
)
def test_vllms_own_allocator_is_refused_by_its_flag(weights, host_driver, setting, flag):
    memory = share_cuda(weights, SimpleNamespace(model_config=SimpleNamespace(**{setting: True})))
    assert [r.name for r in memory.refused] == [flag]
    assert memory.refused[0].blocks
    assert not memory.segments


def test_a_driver_that_fails_refuses_and_does_not_stop_vllm(weights, host_driver):
    host_driver.fails = True
    memory = share_cuda(weights, SLEEPLESS)
    assert {r.name for r in memory.refused} == {"a", "b", "c"}
    assert all("CUDA_ERROR_INVALID_CONTEXT" in r.reason for r in memory.refused)
