"""Other ways to write the same tensors to disk, and the floors. For checkpoint.py.

Each returns (bytes written, seconds for which training stood still; None: all the time).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from apollo_worker.model.host_buffer import one_thread
from checkpoint_model import BenchModel
from safetensors.torch import save_file

BLOCK_BYTES = 8 * 1024 * 1024
Written = tuple[int, float | None]


def save_safetensors(model: BenchModel, directory: Path, _: list[str]) -> Written:
    """safetensors.torch.save_file over the old shards, and fsync."""
    for shard, names in model.shards.items():
        save_file({name: model.live[name] for name in names}, directory / shard)
        _fsync(directory / shard)
    return _size(directory), None


def save_torch(model: BenchModel, directory: Path, _: list[str]) -> Written:
    """torch.save over the old file, and fsync."""
    torch.save(model.live, directory / "model.pt")
    _fsync(directory / "model.pt")
    return _size(directory), None


def save_distributed(model: BenchModel, directory: Path, _: list[str]) -> Written:
    """torch.distributed.checkpoint.async_save, one process; its writer flushes (sync_files)."""
    target = directory / "checkpoint"
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    writer = dcp.FileSystemWriter(target, sync_files=True)
    saved = dcp.async_save(dict(model.live), storage_writer=writer, no_dist=True)
    blocked_s = time.perf_counter() - began
    saved.result()
    return _size(target), blocked_s


def copy_into_map(model: BenchModel, directory: Path, changed: list[str]) -> Written:
    """The earlier design: changed tensors are copied into the mapped old files. A crash leaves a mixture.

    It is told which tensors have changed, so it compares nothing.
    """
    num = 0
    for shard, names in model.shards.items():
        todo = [name for name in names if name in set(changed)]
        if not todo:
            continue
        path = directory / shard
        if not path.exists():
            shutil.copy(model.model_dir / shard, path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        mapped = np.memmap(path, np.uint8, "r+")
        for name in todo:
            start, end = header[name]["data_offsets"]
            mapped[8 + length + start : 8 + length + end] = _bytes(model.live[name])
            num += end - start
        mapped.flush()
    return num, None


def write_plainly(model: BenchModel, directory: Path, changed: list[str]) -> Written:
    """A floor: os.write of 8 MiB blocks into new files beside the old ones, one a shard, and fdatasync.

    New ones, since nothing that survives a crash can do without. `tidy` makes them the old ones, untimed.
    """
    return _write(model, directory, changed, ".new"), None


def tidy(directory: Path) -> None:
    for path in directory.glob("*.new"):
        path.rename(path.with_suffix(""))


def overwrite_plainly(model: BenchModel, directory: Path, changed: list[str]) -> Written:
    """The same over the old files. Cut off, it has destroyed them; but the kernel reuses their pages."""
    return _write(model, directory, changed, ""), None


def _write(model: BenchModel, directory: Path, changed: list[str], suffix: str) -> int:
    num = 0
    for shard, names in model.shards.items():
        todo = [name for name in names if name in set(changed)]
        if not todo:
            continue
        fd = os.open(directory / (shard + suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for name in todo:
            data = _bytes(model.live[name]).data
            for start in range(0, len(data), BLOCK_BYTES):
                num += os.write(fd, data[start : start + BLOCK_BYTES])
        os.fdatasync(fd)
        os.close(fd)
    return num


def read_once(model: BenchModel, _: Path, __: list[str]) -> Written:
    """A floor: every live byte read by one thread, as in our sync: a sum of int64."""
    with one_thread():
        for tensor in model.live.values():
            tensor.view(-1).view(torch.int64).sum()
    return 0, None


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
