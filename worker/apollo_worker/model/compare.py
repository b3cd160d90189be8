"""Live weights against the checkpoint on disk, bit for bit: what the first attach to a vLLM looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch

from apollo_ipc.checkpoint.shards import ShardTensor, reading, shard_index
from apollo_worker.model.host_buffer import HostBuffer, as_bytes, as_integers, one_thread, torch_dtype
from apollo_worker.model.live_tensor import LiveTensor, agrees, whole


class CompareResult(msgspec.Struct, frozen=True):
    num_equal: int
    different: list[str]  # other bits, or another shape
    missing: list[str]  # live, but in no shard (a tied lm_head is one)
    unmapped: list[str]  # in a shard, but not live
    bytes_compared: int  # of the shards

    @property
    def is_equal(self) -> bool:
        return not self.different


def compare(
    model_dir: Path, tensors: Mapping[str, LiveTensor], on_progress: Callable[[], None] = lambda: None
) -> CompareResult:
    """Live views against the shards on disk, bit for bit, after the cast that loading does.

    A view that is fp32 where the shard is bf16 is equal when it is exactly the shard's values; what several
    ranks hold, where each of them does. Raises CheckpointError for a directory or dtype that cannot be read.
    on_progress: called after each tensor.
    """
    index = shard_index(model_dir)
    mapped = {name: tensor for name, tensor in tensors.items() if name in index}
    host = HostBuffer(pinned=any(tensor.is_cuda for tensor in mapped.values()))
    with one_thread():
        different = []
        for name, live in mapped.items():
            tensor = whole(live)
            if not (_equals_shard(model_dir, tensor, index[name], host) and agrees(live, tensor)):
                different.append(name)
            on_progress()
    return CompareResult(
        num_equal=len(mapped) - len(different),
        different=different,
        missing=sorted(tensors.keys() - index.keys()),
        unmapped=sorted(index.keys() - tensors.keys()),
        bytes_compared=sum(index[name].size_bytes for name in mapped),
    )


def _equals_shard(model_dir: Path, live: torch.Tensor, tensor: ShardTensor, host: HostBuffer) -> bool:
    if list(live.shape) != tensor.shape:
        return False
    dtype = torch_dtype(model_dir, tensor)
    with reading(model_dir / tensor.shard) as file:
        file.seek(tensor.start)
        for block in host.blocks(live, live.dtype):
            stored = torch.empty(block.numel(), dtype=dtype)
            file.readinto(as_bytes(stored))
            # By bits: NaN must equal itself, and -0.0 must not equal 0.0.
            if not torch.equal(as_integers(stored.to(live.dtype)), as_integers(block)):
                return False
    return True
