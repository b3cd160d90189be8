"""Tensors of any device, strides and dtype, read in order through one small buffer of host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from apollo_ipc.checkpoint.shards import BLOCK_BYTES, ShardTensor, read_blocks
from apollo_ipc.errors import CheckpointError

MAX_BYTES = 512 * 1024  # max_abs goes twice over so many bytes while they are in a core's own cache

# By safetensors' names.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread for the block.

    Blocks are small, so more threads gain little; and beside a busy vLLM each of OpenMP's barriers waits for
    the scheduler: 512 MB compared in 0.16 s by one thread and in 2.2 to 3.4 s by two, on two loaded cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class HostBuffer:
    """BLOCK_BYTES of host memory through which tensors leave their device.

    pinned: page-locked, without which a copy from CUDA runs at a fraction of the bus.
    """

    def __init__(self, *, pinned: bool):
        self._bytes = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned)

    def blocks(self, tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The elements of `tensor` in order, cast to `dtype`: 1-D CPU tensors, each valid until the next, and
        not to be written to."""
        for piece in flat_pieces(tensor, BLOCK_BYTES // dtype.itemsize):
            if not piece.is_cuda and piece.dtype == dtype and piece.is_contiguous():
                yield piece  # where it lies: nothing writes to it while it is read
                continue
            block = self._bytes.view(dtype)[: piece.numel()]
            block.copy_(piece.to(dtype))
            yield block


def stored_blocks(model_dir: Path, tensor: ShardTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The elements of a tensor in its shard, cast to `dtype` as loading casts them: 1-D CPU tensors, each
    valid until the next. Raises CheckpointError."""
    stored = torch_dtype(model_dir, tensor)
    for block in read_blocks(model_dir / tensor.shard, tensor.start, tensor.end):
        yield torch.frombuffer(block, dtype=stored).to(dtype)


def flat_pieces(tensor: torch.Tensor, max_elements: int) -> Iterator[torch.Tensor]:
    """The elements of `tensor` in order, in 1-D pieces of at most `max_elements`, whatever its strides.

    Copies nothing where the tensor is contiguous, and otherwise no more than a piece at a time.
    """
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(max_elements)
        return
    num_rows = max_elements // math.prod(tensor.shape[1:])
    if num_rows:
        for rows in tensor.split(num_rows):
            yield rows.reshape(-1)
    else:
        for row in tensor:
            yield from flat_pieces(row, max_elements)


def as_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a 1-D CPU tensor, not copied."""
    return block.view(torch.uint8).numpy().data


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of `tensor`, as integers as wide as its elements."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(widths[tensor.dtype.itemsize])


def max_abs(block: torch.Tensor) -> float:
    """The largest magnitude in a 1-D CPU block that is not empty; NaN where there is one, 0 for integers."""
    if not block.is_floating_point():
        return 0.0
    # Bits without their sign grow with the magnitude, from 0 over infinity to NaN: two integer maxima, the
    # signed one for what is positive, the unsigned one for what is negative. In bf16 twice as fast as
    # abs().max(), which writes a copy, and ten times as fast as isfinite().all().
    width = block.dtype.itemsize
    bits = as_integers(block).numpy()
    signed, unsigned, magnitude = bits.view(f"i{width}"), bits.view(f"u{width}"), (1 << 8 * width - 1) - 1
    largest = 0
    for start in range(0, bits.size, MAX_BYTES // width):
        part = slice(start, start + MAX_BYTES // width)
        largest = max(largest, int(signed[part].max()), int(unsigned[part].max()) & magnitude)
    return torch.from_numpy(np.array([largest], f"i{width}")).view(block.dtype).double().item()


def torch_dtype(model_dir: Path, tensor: ShardTensor) -> torch.dtype:
    """Raises CheckpointError for a dtype that torch does not have."""
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{model_dir / tensor.shard}: {tensor.name!r} has dtype {tensor.dtype}")
    return DTYPES[tensor.dtype]
