"""Shards that a full sync has kept whole become differences, once there is time for it.

    shards 2 <--kept-- shards 4 <--differences-- shards 6        kept whole: becomes differences
    shards 2 <--------differences--------------- shards 6        no version needs the shards of 4: one for two

The second keeps a pinned version from collecting one set of differences for each full sync after it.
"""

from __future__ import annotations

import itertools
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
from apollo_ipc.errors import CheckpointError

log = logging.getLogger(__name__)


class _Step(msgspec.Struct, frozen=True):
    """Neighbouring undos, of which one is made."""

    undos: list[Undo]

    @property
    def base(self) -> int:
        return self.undos[0].base

    @property
    def newer(self) -> int:
        return self.undos[-1].newer

    def size_bytes(self, model_dir: Path) -> int:
        kept = [state_path(model_dir, f"old-{undo.base}") / name for undo in self.undos for name in undo.kept]
        differences = sum(undo.delta.file.size_bytes for undo in self.undos if undo.delta)
        return differences + sum(path.stat().st_size for path in kept)


def compact(
    model_dir: Path,
    *,
    disk: Disk = DISK,
    lock_wait_s: float = LOCK_WAIT_S,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Replaces each old-<base>/, and what leads over shards that no version needs, by undo-<base>-<newer>.
    Returns how many bytes that frees.

    The lock is held only while the record is replaced; if the checkpoint moves on meanwhile, or a recovery
    removes the unfinished file, nothing is changed and a later call does it again. is_cancelled is asked
    before each tensor. Raises CheckpointError.
    """
    freed = 0
    while (commit := read_commit(model_dir)) and (step := _next_step(commit)):
        old_bytes = step.size_bytes(model_dir)
        try:
            delta = _write_undo(model_dir, commit, step, disk, is_cancelled)
        except CheckpointError:
            if read_commit(model_dir) == commit:
                raise
            break  # the shards that were read are not this commit's any more
        if delta is None or not _replace(model_dir, step, delta, disk, lock_wait_s):
            break
        freed += old_bytes - delta.file.size_bytes
        log.info(
            "%s: the shards before commit %d are now %d bytes of differences instead of %d bytes",
            *(model_dir, step.newer, delta.file.size_bytes, old_bytes),
        )
    return freed


def _next_step(commit: Commit) -> _Step | None:
    for undo in commit.undos:
        if undo.kept:
            return _Step([undo])
    needed = {version.base for version in history.versions(commit)}
    for older, newer in itertools.pairwise(commit.undos):
        if older.newer == newer.base and newer.base not in needed:
            return _Step([older, newer])
    return None


def _write_undo(
    model_dir: Path, commit: Commit, step: _Step, disk: Disk, is_cancelled: Callable[[], bool]
) -> Delta | None:
    """The differences from the newer shards to the older ones. None: the newer ones are being replaced."""
    reader = history.BaseReader(model_dir, commit)
    path = state_path(model_dir, f"undo-{step.base}-{step.newer}")
    kept = {name for undo in step.undos for name in undo.kept}
    differing = {name for undo in step.undos if undo.delta for name in undo.delta.tensors}
    tensors: dict[str, DeltaTensor] = {}
    whole = history.RunningDigest()
    file = disk.create(path, 0o600)
    try:
        for name in commit.shards:
            for tensor in read_shard(model_dir / name).tensors:
                if name not in kept and tensor.name not in differing:
                    continue
                if is_cancelled():
                    return None
                new, old = reader.read(tensor, step.newer), reader.read(tensor, step.base)
                digests = history.digest(new), history.digest(old)
                if step.newer == commit.base and digests[0] != commit.in_shard(tensor.name):
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


def _replace(model_dir: Path, step: _Step, delta: Delta, disk: Disk, lock_wait_s: float) -> bool:
    with disk.lock(model_dir / STATE_DIR / "lock", lock_wait_s):
        commit = read_commit(model_dir)
        is_there = state_path(model_dir, delta.file.name).exists()
        if commit is None or not is_there or any(undo not in commit.undos for undo in step.undos):
            return False
        if pending_dir(model_dir, commit.serial).is_dir():
            return False  # to be recovered first
        at = commit.undos.index(step.undos[0])
        made = Undo(step.base, step.newer, delta=delta)
        undos = [*commit.undos[:at], made, *commit.undos[at + len(step.undos) :]]
        disk.sync_dir(model_dir / STATE_DIR)  # the name of what the record will speak of
        publish(model_dir, msgspec.structs.replace(commit, undos=undos), disk)
        clean(model_dir, read_commit(model_dir), disk)
        return True
