"""The part of a sync that needs no live weights and no torch: it runs beside training, in its own thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from apollo_ipc.checkpoint import delta as codec
from apollo_ipc.checkpoint.compact import compact
from apollo_ipc.checkpoint.delta import PIECE_ELEMENTS
from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.checkpoint.history import RunningDigest
from apollo_ipc.checkpoint.record import Commit, Delta, DeltaTensor, FileRecord
from apollo_ipc.checkpoint.shards import DTYPE_BYTES, Shard, ShardTensor, file_digest, read_blocks
from apollo_ipc.checkpoint.transaction import Transaction
from apollo_ipc.errors import CheckpointError
from apollo_ipc.wire.replies import SyncResult
from apollo_ipc.wire.requests import SyncKind
from apollo_worker.sync.copy_out import CopyOut
from apollo_worker.sync.optimizer_file import OptimizerFile

log = logging.getLogger(__name__)
LOOK_S = 0.1  # between two looks at what has been written


class Todo(msgspec.Struct, frozen=True):
    """What a sync has to write: whole shards, or differences; `live` in the order in which it is copied.

    digests: of the live tensors, where they are known before the writing (delta).
    """

    kind: SyncKind
    shards: list[Shard]
    live: list[ShardTensor]
    digests: dict[str, str]
    space_bytes: int


class RunningSync:
    """A sync whose live bytes were copied out. `committed`: done when it is durable, or has failed."""

    def __init__(self, task: SyncTask, stack: ExitStack, disk: Disk):
        """stack: holds the transaction; closed by the thread."""
        self.committed: Future[SyncResult] = Future()
        self._task, self._stack, self._disk = task, stack, disk
        self._is_urgent, self._is_copied = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="apollo-sync")
        try:
            self._thread.start()
        except RuntimeError:
            stack.close()
            raise

    def copied_out(self, waited_s: float, max_abs_weight: float, max_abs_name: str | None) -> None:
        """The main thread has put the last block, and training goes on."""
        self._task.seen = waited_s, max_abs_weight, max_abs_name
        self._task.copies.all_put()
        self._is_copied.set()

    def fail(self, error: BaseException) -> None:
        """The main thread cannot copy. Returns when the transaction was thrown away."""
        self._task.copies.fail(error)
        self._is_copied.set()
        self._thread.join()

    def is_committed(self, timeout_s: float = 0.0) -> bool:
        with suppress(TimeoutError):
            self.committed.exception(timeout_s)
        return self.committed.done()

    @property
    def bytes_written(self) -> int:
        return self._task.transaction.bytes_written

    def wait_committed(self, on_progress: Callable[[], None]) -> None:
        """Until it has come to its end, well or badly. on_progress: whenever more has been written."""
        self._wait(self.is_committed, on_progress)

    def join(self, *, is_urgent: bool = False, on_progress: Callable[[], None] = lambda: None) -> None:
        """Until its thread has ended. is_urgent: without the compaction that follows the commit."""
        if is_urgent:
            self._is_urgent.set()
        self._wait(self._has_ended, on_progress)

    def _has_ended(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _wait(self, is_over: Callable[[float], bool], on_progress: Callable[[], None]) -> None:
        seen = -1
        while not is_over(LOOK_S):
            if self.bytes_written != seen:
                seen = self.bytes_written
                on_progress()

    def _run(self) -> None:
        try:
            with self._stack:
                commit = self._task.commit()
            self._is_copied.wait()
            result = self._task.result(commit)
        except BaseException as error:
            self._task.copies.fail(error)
            self._is_copied.wait()  # until then the main thread may be copying
            self._task.copies.close()
            self.committed.set_exception(error)
            return
        self._task.copies.close()
        self.committed.set_result(result)
        if not commit.undos:
            return
        try:
            compact(self._task.transaction.model_dir, disk=self._disk, is_cancelled=self._is_urgent.is_set)
        except CheckpointError as error:
            # The version is kept all the same, as whole shards; after the next sync it is tried again.
            log.warning("older shards could not be compacted: %s", error.message)


class SyncTask(msgspec.Struct):
    """What a sync's thread works from."""

    transaction: Transaction
    shards: Mapping[str, Shard]
    known: KnownDigests
    todo: Todo
    optimizer: OptimizerFile | None
    copies: CopyOut
    weight_version: int
    applied_seq: int
    extra: dict[str, Any] | None
    num_kept: int
    num_live: int
    live_bytes: int
    started_at: float
    seen: tuple[float, float, str | None] = (0.0, 0.0, None)  # RunningSync.copied_out
    num_changed: int = 0

    def commit(self) -> Commit:
        index = [tensor for shard in self.shards.values() for tensor in shard.tensors]
        delta, digests = None, dict(self.todo.digests)
        if self.todo.kind == "delta":
            delta = self._write_delta()
        else:
            for shard in self.todo.shards:
                digests |= self._write_shard(shard)
        in_shards = {tensor.name: self.known[tensor.name] for tensor in index}
        self.num_changed = sum(found != in_shards[name] for name, found in digests.items())
        return self.transaction.commit(
            weight_version=self.weight_version,
            applied_seq=self.applied_seq,
            extra=self.extra,
            shards=self.shards,
            tensors={**in_shards, **digests},
            optimizer=self.optimizer.write(self.transaction, self.copies) if self.optimizer else None,
            delta=delta,
            in_shards=in_shards,
            num_kept=self.num_kept,
        )

    def result(self, commit: Commit) -> SyncResult:
        waited_s, max_abs_weight, max_abs_name = self.seen
        return SyncResult(
            weight_version=commit.weight_version,
            committed_at=commit.committed_at,
            num_tensors=self.num_live,
            num_tensors_changed=self.num_changed,
            num_shards_written=len(self.todo.shards),
            bytes_compared=self.live_bytes,
            bytes_written=self.transaction.bytes_written,
            duration_s=time.monotonic() - self.started_at,
            kind=self.todo.kind,
            training_waited_s=waited_s,
            bytes_changed=sum(tensor.size_bytes for tensor in self.todo.live),
            delta_bytes=commit.delta.file.size_bytes if commit.delta else 0,
            max_abs_weight=max_abs_weight,
            max_abs_name=max_abs_name,
        )

    def _write_shard(self, shard: Shard) -> dict[str, str]:
        """The old header, so that order, alignment and metadata stay; then each tensor. Returns digests."""
        digests = {}
        live = {tensor.name for tensor in self.todo.live}
        model_dir, transaction = self.transaction.model_dir, self.transaction
        with transaction.create(shard.name, shard.mode) as file:
            transaction.write(file, shard.header)
            for tensor in shard.tensors:
                if tensor.name in live:
                    blocks = (block.data for block in self.copies.take(tensor.name))
                else:
                    blocks = read_blocks(model_dir / shard.name, tensor.start, tensor.end)
                found = xxhash.xxh3_128()
                for block in blocks:
                    found.update(block)
                    transaction.write(file, block)
                digests[tensor.name] = found.hexdigest()
                if tensor.name not in live and digests[tensor.name] != self.known[tensor.name]:
                    raise CheckpointError(
                        f"{model_dir / shard.name}: {tensor.name!r} is damaged on disk: its digest is "
                        "not the committed one, and it would be copied into the new shard"
                    )
        return digests

    def _write_delta(self) -> Delta | None:
        """The differences of every changed tensor against the shards. None where nothing differs."""
        if not self.todo.live:
            return None
        transaction = self.transaction
        name, whole, tensors = f"delta-{transaction.serial}", RunningDigest(), {}
        with transaction.create_state(name) as file:
            for tensor in self.todo.live:
                start, base = whole.num_bytes, xxhash.xxh3_128()
                old = _hashed(self._base_pieces(tensor), base)
                new = repiece(self.copies.take(tensor.name), PIECE_ELEMENTS * DTYPE_BYTES[tensor.dtype])
                for data in codec.encode(old, new, tensor.dtype):
                    whole.update(data)
                    transaction.write(file, data)
                if base.hexdigest() != self.known[tensor.name]:
                    raise CheckpointError(
                        f"{transaction.model_dir / tensor.shard}: {tensor.name!r} is damaged on disk: its "
                        "digest is not the committed one, and a difference from it would be worth nothing"
                    )
                result = self.todo.digests[tensor.name]
                tensors[tensor.name] = DeltaTensor(start, whole.num_bytes, base.hexdigest(), result)
        return Delta(FileRecord(name, whole.num_bytes, whole.hexdigest()), tensors)

    def _base_pieces(self, tensor: ShardTensor) -> Iterator[np.ndarray]:
        path = self.transaction.model_dir / tensor.shard
        blocks = (np.frombuffer(b, np.uint8) for b in read_blocks(path, tensor.start, tensor.end))
        return repiece(blocks, PIECE_ELEMENTS * DTYPE_BYTES[tensor.dtype])


def repiece(blocks: Iterator[np.ndarray], size_bytes: int) -> Iterator[np.ndarray]:
    """The same bytes in pieces of `size_bytes`, the last one of what is left."""
    rest = np.empty(0, np.uint8)
    for block in blocks:
        if rest.size:
            missing = size_bytes - rest.size
            rest, block = np.concatenate([rest, block[:missing]]), block[missing:]
            if rest.size < size_bytes:
                continue
            yield rest
        end = block.size - block.size % size_bytes
        for start in range(0, end, size_bytes):
            yield block[start : start + size_bytes]
        rest = block[end:].copy()  # a block is valid only until the next
    if rest.size:
        yield rest


def _hashed(pieces: Iterator[np.ndarray], into: Any) -> Iterator[np.ndarray]:
    for piece in pieces:
        into.update(piece.data)
        yield piece


class KnownDigests:
    """Digest of each tensor as it is in the shards now (without a delta's changes).

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
                recorded = {tensor.name: commit.in_shard(tensor.name) for tensor in shard.tensors}
                self._digests |= {name: digest for name, digest in recorded.items() if digest is not None}

    def __getitem__(self, name: str) -> str:
        if name not in self._digests:
            tensor = self._tensors[name]
            self._digests[name] = file_digest(self._model_dir / tensor.shard, tensor.start, tensor.end)
        return self._digests[name]
