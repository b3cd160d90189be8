"""Live weights -> checkpoint: which shards differ, and a sync of those (apollo_ipc.checkpoint commits it).

Live tensors are copied out piece by piece through one small host buffer, so a sync needs neither a second
copy of the model nor of a shard. Training must stand still meanwhile: the caller syncs between two steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from apollo_ipc.checkpoint import LOCK_WAIT_S, STATE_DIR, Commit, FileRecord, Transaction, begin
from apollo_ipc.disk import DISK, Disk
from apollo_ipc.errors import CheckpointError
from apollo_ipc.messages import SyncResult
from apollo_ipc.shards import (
    Shard,
    ShardTensor,
    file_digest,
    read_blocks,
    read_metadata,
    read_range,
    read_shard,
    read_shards,
    reading,
    shard_index,
)
from apollo_worker.hostcopy import (
    DTYPE_NAMES,
    DTYPES,
    HostBuffer,
    as_bytes,
    as_integers,
    is_finite,
    one_thread,
)

STATE_KEY = "apollo_state"  # where an optimizer file's __metadata__ keeps what is not a tensor


class CheckpointWriter:
    """Syncs `tensors` (checkpoint tensor name -> live view) into the shards of `model_dir`.

    A view may lie on any device, have any strides, and have another dtype than its tensor in the shard.
    Tensors that are only in the shards (vision tower, MTP) stay as they are.

    Raises CheckpointError when a view has another shape than its tensor, or no tensor and is not tied to a
    view that has one: its training would be lost without a word.
    """

    def __init__(
        self,
        model_dir: Path,
        tensors: Mapping[str, torch.Tensor],
        *,
        disk: Disk = DISK,
        lock_wait_s: float = LOCK_WAIT_S,
    ):
        self.model_dir = model_dir
        self._disk = disk
        self._lock_wait_s = lock_wait_s
        index = shard_index(model_dir)
        self._live = {name: tensor.detach() for name, tensor in tensors.items() if name in index}
        _check_all_kept(model_dir, tensors, self._live)
        _check_fit(model_dir, self._live, index)
        self._host = HostBuffer(pinned=any(tensor.is_cuda for tensor in self._live.values()))

    def sync(
        self,
        *,
        weight_version: int,
        applied_seq: int,
        optimizer: tuple[Mapping[str, torch.Tensor], dict[str, Any]] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> SyncResult:
        """Writes the shards whose live tensors differ, and the optimizer state, as one commit.

        optimizer: (tensors, JSON-able rest), or None to keep none beside these weights.
        Raises CheckpointError, also for a non-finite live tensor, which it names. Until the commit record is
        renamed the old checkpoint stays byte for byte; see Transaction.commit for what comes after.
        """
        started = time.monotonic()
        with (
            one_thread(),
            begin(self.model_dir, disk=self._disk, lock_wait_s=self._lock_wait_s) as transaction,
        ):
            shards = read_shards(self.model_dir)
            index = {tensor.name: tensor for shard in shards.values() for tensor in shard.tensors}
            _check_fit(self.model_dir, self._live, index)
            known = KnownDigests(self.model_dir, shards, transaction.previous)
            changed = [shard for shard in shards.values() if self._differs(shard, known)]
            transaction.require_space(sum(shard.size_bytes for shard in changed) + _num_bytes(optimizer))

            digests: dict[str, str] = {}
            for shard in changed:
                digests |= self._write_shard(transaction, shard, known)
            num_changed = sum(digest != known[name] for name, digest in digests.items())
            commit = transaction.commit(
                weight_version=weight_version,
                applied_seq=applied_seq,
                shards=shards,
                tensors={name: digests.get(name) or known[name] for name in index},
                optimizer=write_optimizer(transaction, *optimizer) if optimizer else None,
                extra=extra,
            )
        return SyncResult(
            weight_version=weight_version,
            committed_at=commit.committed_at,
            num_tensors=len(self._live),
            num_tensors_changed=num_changed,
            num_shards_written=len(changed),
            bytes_compared=sum(index[name].size_bytes for name in self._live),
            bytes_written=transaction.bytes_written,
            duration_s=time.monotonic() - started,
        )

    def _differs(self, shard: Shard, known: KnownDigests) -> bool:
        """Stops at the first difference: the rest of a changed shard is read only once, to be written."""
        return any(
            _digest(self._live_blocks(tensor)) != known[tensor.name]
            for tensor in shard.tensors
            if tensor.name in self._live
        )

    def _write_shard(self, transaction: Transaction, shard: Shard, known: KnownDigests) -> dict[str, str]:
        """The old header, so that order, alignment and metadata stay; then each tensor. Returns digests."""
        digests = {}
        with transaction.create(shard.name, shard.mode) as file:
            transaction.write(file, shard.header)
            for tensor in shard.tensors:
                if tensor.name in self._live:
                    blocks = self._live_blocks(tensor)
                else:
                    blocks = read_blocks(self.model_dir / shard.name, tensor.start, tensor.end)
                digest = xxhash.xxh3_128()
                for block in blocks:
                    digest.update(block)
                    transaction.write(file, block)
                digests[tensor.name] = digest.hexdigest()
                if tensor.name not in self._live and digests[tensor.name] != known[tensor.name]:
                    raise CheckpointError(
                        f"{self.model_dir / shard.name}: {tensor.name!r} is damaged on disk: its digest is "
                        "not the committed one, and it would be copied into the new shard"
                    )
        return digests

    def _live_blocks(self, tensor: ShardTensor) -> Iterator[memoryview]:
        for block in self._host.blocks(self._live[tensor.name], DTYPES[tensor.dtype]):
            if not is_finite(block):
                raise CheckpointError(
                    f"{self.model_dir}: the live {tensor.name!r} holds non-finite values as {tensor.dtype}; "
                    "this sync is refused and the checkpoint stays as it was"
                )
            yield as_bytes(block)


class KnownDigests:
    """Digest of each tensor as it is in the shards now.

    From the commit record where the shard is still the file that the commit left (its size and mtime say
    so); else (first sync ever, or a shard that someone replaced) by reading the shard, once.
    """

    def __init__(self, model_dir: Path, shards: Mapping[str, Shard], commit: Commit | None):
        self._model_dir = model_dir
        self._tensors = {tensor.name: tensor for shard in shards.values() for tensor in shard.tensors}
        self._digests: dict[str, str] = {}
        if commit is None:
            return
        for shard in shards.values():
            record = commit.shards.get(shard.name)
            if record and (record.size_bytes, record.mtime_ns) == (shard.size_bytes, shard.mtime_ns):
                names = (tensor.name for tensor in shard.tensors)
                self._digests |= {name: commit.tensors[name] for name in names if name in commit.tensors}

    def __getitem__(self, name: str) -> str:
        if name not in self._digests:
            tensor = self._tensors[name]
            self._digests[name] = file_digest(self._model_dir / tensor.shard, tensor.start, tensor.end)
        return self._digests[name]


# --- comparison at the first attach ---


class CompareResult(msgspec.Struct, frozen=True):
    num_equal: int
    different: list[str]  # other bits, or another shape
    missing: list[str]  # live, but in no shard (a tied lm_head is one)
    unmapped: list[str]  # in a shard, but not live
    bytes_compared: int  # of the shards

    @property
    def is_equal(self) -> bool:
        return not self.different


def compare(model_dir: Path, tensors: Mapping[str, torch.Tensor]) -> CompareResult:
    """Live views against the shards on disk, bit for bit, after the cast that loading does.

    A view that is fp32 where the shard is bf16 is equal when it is exactly the shard's values. Raises
    CheckpointError for a directory or dtype that cannot be read.
    """
    index = shard_index(model_dir)
    mapped = {name: tensor.detach() for name, tensor in tensors.items() if name in index}
    host = HostBuffer(pinned=any(tensor.is_cuda for tensor in mapped.values()))
    with one_thread():
        different = [name for name in mapped if not _equals_shard(model_dir, mapped[name], index[name], host)]
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
    dtype = _torch_dtype(model_dir, tensor)
    with reading(model_dir / tensor.shard) as file:
        file.seek(tensor.start)
        for block in host.blocks(live, live.dtype):
            stored = torch.empty(block.numel(), dtype=dtype)
            file.readinto(as_bytes(stored))
            # By bits: NaN must equal itself, and -0.0 must not equal 0.0.
            if not torch.equal(as_integers(stored.to(live.dtype)), as_integers(block)):
                return False
    return True


# --- optimizer state ---


def write_optimizer(
    transaction: Transaction, tensors: Mapping[str, torch.Tensor], state: dict[str, Any]
) -> FileRecord:
    """One safetensors file in the transaction: `tensors` as they are, `state` as JSON in its metadata."""
    # Widest dtype first, as safetensors.serialize does, keeps every tensor aligned to its own element.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {STATE_KEY: json.dumps(state)}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    host = HostBuffer(pinned=any(tensor.is_cuda for tensor in tensors.values()))
    digest = xxhash.xxh3_128()
    file_name = f"optimizer-{transaction.serial}.safetensors"
    with transaction.create(file_name) as file:
        for block in _optimizer_bytes(text, [tensors[name] for name in names], host):
            digest.update(block)
            transaction.write(file, block)
    return FileRecord(file_name, 8 + len(text) + end, digest.hexdigest())


def _optimizer_bytes(
    header: bytes, tensors: list[torch.Tensor], host: HostBuffer
) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        for block in host.blocks(tensor.detach(), tensor.dtype):
            yield as_bytes(block)


def read_optimizer(model_dir: Path, commit: Commit) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(tensors on the CPU, state) as write_optimizer got them, or None where the commit has no optimizer.

    Raises CheckpointError when the file is missing or not the one that was committed.
    """
    if commit.optimizer is None:
        return None
    path = model_dir / STATE_DIR / commit.optimizer.name
    shard = read_shard(path)
    if file_digest(path, 0, shard.size_bytes) != commit.optimizer.digest:
        raise CheckpointError(f"{path}: damaged: its digest is not the one of commit {commit.serial}")
    tensors = {}
    for tensor in shard.tensors:
        data = read_range(path, tensor.start, tensor.end)
        dtype = DTYPES[tensor.dtype]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensors[tensor.name] = flat.view(tensor.shape)
    return tensors, json.loads(read_metadata(shard.header)[STATE_KEY])


def _digest(blocks: Iterator[memoryview]) -> str:
    digest = xxhash.xxh3_128()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _num_bytes(optimizer: tuple[Mapping[str, torch.Tensor], dict[str, Any]] | None) -> int:
    return sum(tensor.nbytes for tensor in optimizer[0].values()) if optimizer else 0


def _check_all_kept(
    model_dir: Path, tensors: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
) -> None:
    places = {_place(tensor) for tensor in kept.values()}
    lost = [name for name, tensor in tensors.items() if name not in kept and _place(tensor) not in places]
    if lost:
        raise CheckpointError(
            f"{model_dir}: no shard has a place for {', '.join(sorted(lost))}: what they learn would be lost"
        )


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _check_fit(model_dir: Path, live: Mapping[str, torch.Tensor], index: Mapping[str, ShardTensor]) -> None:
    for name, tensor in live.items():
        if name not in index:
            raise CheckpointError(f"{model_dir}: {name!r} is in no shard any more; did the files change?")
        if list(tensor.shape) != index[name].shape:
            raise CheckpointError(
                f"{model_dir / index[name].shard}: {name!r} is {index[name].shape}, live {list(tensor.shape)}"
            )
        _torch_dtype(model_dir, index[name])


def _torch_dtype(model_dir: Path, tensor: ShardTensor) -> torch.dtype:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{model_dir / tensor.shard}: {tensor.name!r} has dtype {tensor.dtype}")
    return DTYPES[tensor.dtype]
