"""Shards that a full sync has kept whole become differences, once there is time for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from apollo_ipc.checkpoint import delta as codec
from apollo_ipc.checkpoint import history
from apollo_ipc.checkpoint.disk import DISK, Disk
from apollo_ipc.checkpoint.record import (
    STATE_DIR,
    Commit,
    Delta,
    DeltaTensor,
    FileRecord,
    Undo,
    pending_dir,
    publish,
    read_commit,
    state_path,
)
from apollo_ipc.checkpoint.recovery import LOCK_WAIT_S, clean
from apollo_ipc.checkpoint.shards import read_shard

log = logging.getLogger(__name__)


def compact(
    model_dir: Path,
    *,
    disk: Disk = DISK,
    lock_wait_s: float = LOCK_WAIT_S,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Replaces each old-<base>/ by undo-<base>-<newer>. Returns how many bytes that frees.

    The lock is held only while the record is replaced; if the checkpoint moves on meanwhile, or a recovery
    removes the unfinished file, nothing is changed and a later call does it again. is_cancelled is asked
    before each tensor. Raises CheckpointError.
    """
    freed = 0
    while (commit := read_commit(model_dir)) and (undo := next((u for u in commit.undos if u.kept), None)):
        old_dir = state_path(model_dir, f"old-{undo.base}")
        old_bytes = sum((old_dir / name).stat().st_size for name in undo.kept)
        delta = _write_undo(model_dir, commit, undo, disk, is_cancelled)
        if delta is None or not _replace(model_dir, commit, undo, delta, disk, lock_wait_s):
            break
        freed += old_bytes - delta.file.size_bytes
        log.info(
            "%s: the shards before commit %d are now %d bytes of differences instead of %d bytes",
            *(model_dir, undo.newer, delta.file.size_bytes, old_bytes),
        )
    return freed


def _write_undo(
    model_dir: Path, commit: Commit, undo: Undo, disk: Disk, is_cancelled: Callable[[], bool]
) -> Delta | None:
    """The differences from the newer shards to the kept ones. None: the newer ones are being replaced."""
    reader = history.BaseReader(model_dir, commit)
    path = state_path(model_dir, f"undo-{undo.base}-{undo.newer}")
    tensors: dict[str, DeltaTensor] = {}
    whole = history.RunningDigest()
    file = disk.create(path, 0o600)
    try:
        for name in undo.kept:
            for tensor in read_shard(model_dir / name).tensors:
                if is_cancelled():
                    return None
                new, old = reader.read(tensor, undo.newer), reader.read(tensor, undo.base)
                digests = history.digest(new), history.digest(old)
                if undo.newer == commit.base and digests[0] != commit.in_shard(tensor.name):
                    return None
                if digests[0] == digests[1]:
                    continue
                start = whole.num_bytes
                before, after = codec.pieces(new, tensor.dtype), codec.pieces(old, tensor.dtype)
                for data in codec.encode(before, after, tensor.dtype):
                    disk.write(file, data)
                    whole.update(data)
                tensors[tensor.name] = DeltaTensor(start, whole.num_bytes, *digests)
        disk.sync(file)
    finally:
        disk.close(file)
    return Delta(FileRecord(path.name, whole.num_bytes, whole.hexdigest()), tensors)


def _replace(model_dir: Path, seen: Commit, undo: Undo, delta: Delta, disk: Disk, lock_wait_s: float) -> bool:
    with disk.lock(model_dir / STATE_DIR / "lock", lock_wait_s):
        commit = read_commit(model_dir)
        is_there = state_path(model_dir, delta.file.name).exists()
        if commit is None or undo not in commit.undos or not is_there:
            return False
        if pending_dir(model_dir, commit.serial).is_dir():
            return False  # to be recovered first
        compacted = Undo(undo.base, undo.newer, delta=delta)
        undos = [compacted if one == undo else one for one in commit.undos]
        disk.sync_dir(model_dir / STATE_DIR)  # the name of what the record will speak of
        publish(model_dir, msgspec.structs.replace(commit, undos=undos), disk)
        clean(model_dir, read_commit(model_dir), disk)
        return True
