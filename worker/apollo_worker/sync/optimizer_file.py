"""The optimizer's state beside the weights: one safetensors file, the rest of the state in its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from apollo_ipc.checkpoint.history import RunningDigest
from apollo_ipc.checkpoint.record import FileRecord, state_path
from apollo_ipc.checkpoint.shards import file_digest, read_metadata, read_range, read_shard
from apollo_ipc.checkpoint.transaction import Transaction
from apollo_ipc.errors import CheckpointError
from apollo_worker.model.host_buffer import DTYPE_NAMES, DTYPES
from apollo_worker.sync.copy_out import CopyOut

STATE_KEY = "apollo_state"  # where the file's __metadata__ keeps what is not a tensor


class OptimizerFile:
    """The layout of `tensors` (name -> any device) and `state` (JSON) in one safetensors file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], state: dict[str, Any]):
        # Widest dtype first, as safetensors.serialize does, keeps every tensor aligned to its own element.
        self.names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": {STATE_KEY: json.dumps(state)}}
        end = 0
        for name in self.names:
            start, end = end, end + tensors[name].nbytes
            dtype, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.size_bytes = len(self._header) + end
        self.sizes_bytes = [tensors[name].nbytes for name in self.names]

    def write(self, transaction: Transaction, copies: CopyOut) -> FileRecord:
        """Into the transaction; the tensors come out of `copies` in the order of `names`."""
        digest = RunningDigest()
        file_name = f"optimizer-{transaction.serial}.safetensors"
        with transaction.create_state(file_name) as file:
            digest.update(self._header)
            transaction.write(file, self._header)
            for name in self.names:
                for block in copies.take(name):
                    digest.update(block.data)
                    transaction.write(file, block.data)
        return FileRecord(file_name, self.size_bytes, digest.hexdigest())


def read_optimizer(
    model_dir: Path, file: FileRecord | None, on_progress: Callable[[], None] = lambda: None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(tensors on the CPU, state) as they were written, or None where a version has no optimizer.

    on_progress: called after each piece. Raises CheckpointError when the file is missing or not the one that
    was committed.
    """
    if file is None:
        return None
    path = state_path(model_dir, file.name)
    shard = read_shard(path)
    if file_digest(path, 0, shard.size_bytes, on_progress) != file.digest:
        raise CheckpointError(f"{path}: damaged: its digest is not the one that was committed")
    tensors = {}
    for tensor in shard.tensors:
        data = read_range(path, tensor.start, tensor.end)
        on_progress()
        dtype = DTYPES[tensor.dtype]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensors[tensor.name] = flat.view(tensor.shape)
    return tensors, json.loads(read_metadata(shard.header)[STATE_KEY])
