"""Live weights -> checkpoint: what differs, and a sync of that (apollo_ipc.checkpoint commits it).

    training stands still:  lock -> compare with the digests of the last commit -> copy out what differs
    training goes on:       write -> flush -> commit -> compact older versions        (a thread of its own)

A full sync writes whole shards; a delta sync writes only differences against the shards, and leaves them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import xxhash

from apollo_ipc.checkpoint.disk import DISK, Disk
from apollo_ipc.checkpoint.recovery import LOCK_WAIT_S
from apollo_ipc.checkpoint.shards import Shard, ShardTensor, read_shards, shard_index
from apollo_ipc.checkpoint.transaction import begin
from apollo_ipc.errors import CheckpointError
from apollo_ipc.wire.replies import SyncResult
from apollo_ipc.wire.requests import SyncKind
from apollo_worker.model.host_buffer import (
    DTYPES,
    HostBuffer,
    as_bytes,
    max_abs,
    one_thread,
    stored_blocks,
    torch_dtype,
)
from apollo_worker.model.live_tensor import LiveTensor, place, whole
from apollo_worker.sync.copy_out import Arenas, CopyOut, budget_for
from apollo_worker.sync.optimizer_file import OptimizerFile
from apollo_worker.sync.sync_task import KnownDigests, RunningSync, SyncTask, Todo

# What a delta is expected to take of the changed bytes, for the check of free space: see docs/checkpoint.md.
DELTA_SPACE_FRACTION = 0.5

Optimizer = tuple[Mapping[str, torch.Tensor], dict[str, Any]]  # tensors, JSON-able rest


class CheckpointWriter:
    """Syncs `tensors` (checkpoint tensor name -> live view) into the shards of `model_dir`.

    A view may lie on any device, have any strides, be in pieces, and have another dtype than in the shard.
    Tensors that are only in the shards (vision tower, MTP) stay as they are. num_kept: how many older
    versions stay restorable; max_abs_limit: a live weight beyond it refuses a sync (0: none does).

    Raises CheckpointError when a view has another shape than its tensor, or no tensor and is not tied to a
    view that has one: its training would be lost without a word.
    """

    def __init__(
        self,
        model_dir: Path,
        tensors: Mapping[str, LiveTensor],
        *,
        disk: Disk = DISK,
        lock_wait_s: float = LOCK_WAIT_S,
        num_kept: int = 0,
        max_abs_limit: float = 0.0,
    ):
        self.model_dir = model_dir
        self._disk = disk
        self._lock_wait_s = lock_wait_s
        self._num_kept = num_kept
        self._max_abs_limit = max_abs_limit
        index = shard_index(model_dir)
        self._live = {name: tensor for name, tensor in tensors.items() if name in index}
        _check_all_kept(model_dir, tensors, self._live)
        _check_fit(model_dir, self._live, index)
        self._host = HostBuffer(pinned=any(tensor.is_cuda for tensor in self._live.values()))
        self._arenas = Arenas()
        self._digests_as_loaded: dict[tuple[str, str], str] = {}  # by name and digest in the shard
        self._max_abs: tuple[float, str | None] = (0.0, None)
        self._running: RunningSync | None = None

    def prepare(self, optimizer_bytes: int) -> None:
        """Gets host memory for a full sync, in a thread: else training waits for it in the first."""
        sizes = [tensor.nbytes for tensor in self._live.values()]
        num_bytes = budget_for([*sizes, optimizer_bytes], least_bytes=0)
        threading.Thread(
            target=self._arenas.get, args=(num_bytes,), name="apollo-host-memory", daemon=True
        ).start()

    def sync(
        self,
        kind: SyncKind = "full",
        *,
        weight_version: int,
        applied_seq: int,
        optimizer: Optimizer | None = None,
        extra: dict[str, Any] | None = None,
    ) -> SyncResult:
        """`start`, and then waiting for its commit and for its compaction."""
        running = self.start(
            kind, weight_version=weight_version, applied_seq=applied_seq, optimizer=optimizer, extra=extra
        )
        running.join()
        return running.committed.result()

    def start(
        self,
        kind: SyncKind = "full",
        *,
        weight_version: int,
        applied_seq: int,
        optimizer: Optimizer | None = None,
        extra: dict[str, Any] | None = None,
        check_live: Callable[[], None] = lambda: None,
        on_progress: Callable[[], None] = lambda: None,
        num_kept: int = 0,
    ) -> RunningSync:
        """Writes what differs, and the optimizer state, as one commit. Returns when all is copied out.

        optimizer: None to keep none beside these weights. check_live: called under the lock, before anything
        is read; raises where the live weights are nobody's any more. on_progress: called before each tensor.
        num_kept: at least so many older versions stay restorable, once.
        Raises CheckpointError, also for a non-finite live tensor, which it names; and `committed` of what is
        returned may fail with one. Until the commit record is renamed the old checkpoint stays byte for byte;
        see Transaction.commit for what comes after.
        """
        self.wait(is_urgent=True)
        started = time.monotonic()
        self._max_abs = (0.0, None)
        with ExitStack() as stack, one_thread():
            transaction = stack.enter_context(
                begin(self.model_dir, disk=self._disk, lock_wait_s=self._lock_wait_s)
            )
            check_live()
            shards = read_shards(self.model_dir)
            index = {tensor.name: tensor for shard in shards.values() for tensor in shard.tensors}
            _check_fit(self.model_dir, self._live, index)
            known = KnownDigests(self.model_dir, shards, transaction.previous)
            layout = OptimizerFile(*optimizer) if optimizer else None
            todo = (
                self._changed_shards(shards, known) if kind == "full" else self._changed_tensors(index, known)
            )
            sizes = [t.size_bytes for t in todo.live] + (layout.sizes_bytes if layout else [])
            transaction.require_space(todo.space_bytes + (layout.size_bytes if layout else 0))
            task = SyncTask(
                transaction=transaction,
                shards=shards,
                known=known,
                todo=todo,
                optimizer=layout,
                copies=CopyOut(
                    budget_for(sizes, max(shard.size_bytes for shard in shards.values())), self._arenas
                ),
                weight_version=weight_version,
                applied_seq=applied_seq,
                extra=extra,
                num_kept=max(num_kept, self._num_kept),
                num_live=len(self._live),
                live_bytes=sum(index[name].size_bytes for name in self._live),
                started_at=started,
            )
            self._running = running = RunningSync(task, stack.pop_all(), self._disk)
            try:
                for tensor in todo.live:
                    on_progress()
                    task.copies.put(tensor.name, self._checked_blocks(tensor))
                for name in layout.names if layout else ():
                    assert optimizer is not None
                    tensor = optimizer[0][name].detach()
                    task.copies.put(name, self._host.blocks(tensor, tensor.dtype))
            except BaseException as error:
                running.fail(error)
                raise
            running.copied_out(time.monotonic() - started, *self._max_abs)
        return running

    def wait(self, *, is_urgent: bool = False, on_progress: Callable[[], None] = lambda: None) -> None:
        """Until no thread of the last sync runs any more. is_urgent: its compaction is left for later."""
        if self._running is not None:
            self._running.join(is_urgent=is_urgent, on_progress=on_progress)
            self._running = None

    def let_go(self) -> None:
        """Of the live views, for good: one keeps the memory mapped. A running sync writes from copies."""
        self._live = {}

    def _changed_shards(self, shards: Mapping[str, Shard], known: KnownDigests) -> Todo:
        changed = [shard for shard in shards.values() if self._has_changed(shard, known)]
        # Of a changed shard everything live is written; what would be rounded only where it has changed.
        live = [
            tensor
            for shard in changed
            for tensor in shard.tensors
            if tensor.name in self._live and (not self._is_rounded(tensor) or self._differs(tensor, known))
        ]
        return Todo("full", changed, live, {}, sum(shard.size_bytes for shard in changed))

    def _has_changed(self, shard: Shard, known: KnownDigests) -> bool:
        """Stops at the first difference: the rest of a changed shard is read only once, to be written."""
        return any(self._differs(tensor, known) for tensor in shard.tensors if tensor.name in self._live)

    def _differs(self, tensor: ShardTensor, known: KnownDigests) -> bool:
        """Whether training has changed it: a load of the shard would give other values than the live ones."""
        if not self._is_rounded(tensor):
            return self._live_digest(tensor, DTYPES[tensor.dtype]) != known[tensor.name]
        dtype, key = self._live[tensor.name].dtype, (tensor.name, known[tensor.name])
        if key not in self._digests_as_loaded:
            self._digests_as_loaded[key] = _digest(stored_blocks(self.model_dir, tensor, dtype))
        return self._live_digest(tensor, dtype) != self._digests_as_loaded[key]

    def _is_rounded(self, tensor: ShardTensor) -> bool:
        """Whether loading drops bits of it (F32 served in bf16): written back from the live tensor, they
        would be lost where nothing was trained."""
        return self._live[tensor.name].dtype.itemsize < DTYPES[tensor.dtype].itemsize

    def _changed_tensors(self, index: Mapping[str, ShardTensor], known: KnownDigests) -> Todo:
        live = [t for name, t in index.items() if name in self._live and self._differs(t, known)]
        digests = {t.name: self._live_digest(t, DTYPES[t.dtype]) for t in live}
        space = sum(tensor.size_bytes for tensor in live) * DELTA_SPACE_FRACTION
        return Todo("delta", [], live, digests, int(space))

    def _live_digest(self, tensor: ShardTensor, dtype: torch.dtype) -> str:
        # Not looked at for NaN: bytes that are the committed ones were looked at when they were, and
        # what differs is looked at when it is copied. So an unchanged tensor costs one read.
        return _digest(self._host.blocks(whole(self._live[tensor.name]), dtype))

    def _checked_blocks(self, tensor: ShardTensor) -> Iterator[torch.Tensor]:
        """Raises CheckpointError at a weight that no checkpoint may hold."""
        for block in self._host.blocks(whole(self._live[tensor.name]), DTYPES[tensor.dtype]):
            largest = max_abs(block)
            if not math.isfinite(largest):
                raise CheckpointError(
                    f"{self.model_dir}: the live {tensor.name!r} holds non-finite values as {tensor.dtype}; "
                    "this sync is refused and the checkpoint stays as it was. `apollo-ipc checkpoint restore "
                    "VERSION --live` brings a good version back",
                    code="not_finite",
                )
            if self._max_abs_limit and largest > self._max_abs_limit:
                raise CheckpointError(
                    f"{self.model_dir}: the live {tensor.name!r} holds a weight of {largest:g}, beyond "
                    f"checkpoint.max_abs_weight ({self._max_abs_limit:g}); this sync is refused and the "
                    "checkpoint stays as it was",
                    code="weight_too_large",
                )
            if largest > self._max_abs[0]:
                self._max_abs = largest, tensor.name
            yield block


def _digest(blocks: Iterator[torch.Tensor]) -> str:
    found = xxhash.xxh3_128()
    for block in blocks:
        found.update(as_bytes(block))
    return found.hexdigest()


def _check_all_kept(
    model_dir: Path, tensors: Mapping[str, LiveTensor], kept: Mapping[str, LiveTensor]
) -> None:
    places = {place(tensor) for tensor in kept.values()}
    lost = [name for name, tensor in tensors.items() if name not in kept and place(tensor) not in places]
    if lost:
        raise CheckpointError(
            f"{model_dir}: no shard has a place for {', '.join(sorted(lost))}: what they learn would be lost"
        )


def _check_fit(model_dir: Path, live: Mapping[str, LiveTensor], index: Mapping[str, ShardTensor]) -> None:
    for name, tensor in live.items():
        if name not in index:
            raise CheckpointError(f"{model_dir}: {name!r} is in no shard any more; did the files change?")
        if list(tensor.shape) != index[name].shape:
            raise CheckpointError(
                f"{model_dir / index[name].shard}: {name!r} is {index[name].shape}, live {list(tensor.shape)}"
            )
        torch_dtype(model_dir, index[name])
