"""What is done before anything else: a committed sync is finished, an unfinished one thrown away.

Run by vLLM before it loads, by the worker at start and before each sync, and by hand. See transaction.py for
what a crash can leave.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from apollo_ipc.checkpoint.disk import DISK, Disk, is_locked
from apollo_ipc.checkpoint.fold import fold
from apollo_ipc.checkpoint.record import (
    STATE_DIR,
    Commit,
    is_current,
    pending_dir,
    publish,
    read_commit,
)
from apollo_ipc.errors import CheckpointError

LOCK_WAIT_S = 60.0
LOAD_WAIT_S = 3600.0  # the flush of a large model on a slow disk; the lock of one that died is free at once
_OURS = ("pending-*", "optimizer-*", "delta-*", "undo-*", "old-*", "fold-*", "commit.json.new")
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Mended(msgspec.Struct, frozen=True):
    """What recover had to do; all empty for a directory that was in order."""

    finished_version: int | None = None  # weight version of a commit whose files were renamed into place
    removed: list[str] = []  # leftovers in .apollo
    folded_version: int | None = None  # weight version whose delta was worked into the shards

    def __bool__(self) -> bool:
        return self != Mended()


def recover(
    model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOCK_WAIT_S, is_folding: bool = True
) -> Mended:
    """Finishes a committed sync, throws an unfinished one away, works a delta into the shards.

    To be called before the shards are loaded. is_folding=False: the shards stay without the delta's changes,
    unless some have them already: a fold that was cut off is finished.
    What it leaves is durable: no power cut brings an older commit back. Idempotent, and free of writes where
    there is nothing to do. Raises CheckpointError when that cannot be done (read-only directory), since the
    shards may then be of two versions, or older than the last commit.
    """
    commit = read_commit(model_dir)
    if not _needs_recovery(model_dir, commit, is_folding):
        _flush_record(model_dir, disk)
        return Mended()
    try:
        with disk.lock(model_dir / STATE_DIR / "lock", lock_wait_s):
            return repair(model_dir, disk, is_folding)
    except CheckpointError as error:
        read_only = getattr(error.__cause__, "errno", None) in _READ_ONLY
        must_fold = _must_fold(model_dir, commit, is_folding)
        if not read_only or must_fold or _is_unfinished(model_dir, commit):
            raise
        return Mended()  # what is left over there is no part of the checkpoint


def _flush_record(model_dir: Path, disk: Disk) -> None:
    """The one who committed may have died between the record's rename and its flush."""
    if not (model_dir / STATE_DIR).is_dir():
        return
    try:
        disk.sync_dir(model_dir / STATE_DIR)
    except CheckpointError as error:
        # EINVAL: a file system that is only read (squashfs) has nothing to flush.
        if getattr(error.__cause__, "errno", None) not in (*_READ_ONLY, errno.EINVAL):
            raise


@contextmanager
def loading(model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOAD_WAIT_S) -> Generator[Mended]:
    """For the block the shards are those of one version, the last commit's: recovered, and no sync begins.

    Raises CheckpointError like recover.
    """
    recovery = recover(model_dir, disk=disk, lock_wait_s=lock_wait_s)
    while True:
        try:
            locked = disk.lock(model_dir / STATE_DIR / "lock", lock_wait_s, is_shared=True)
            locked.__enter__()
        except CheckpointError as error:
            if getattr(error.__cause__, "errno", None) not in (*_READ_ONLY, errno.ENOENT):
                raise
            yield recovery  # never synced, or a directory that nobody can write to
            return
        try:
            # A sync may have come between the two locks.
            if not _needs_recovery(model_dir, read_commit(model_dir), True):
                yield recovery
                return
        finally:
            locked.__exit__(None, None, None)
        recovery = recover(model_dir, disk=disk, lock_wait_s=lock_wait_s)


def _needs_recovery(model_dir: Path, commit: Commit | None, is_folding: bool) -> bool:
    return bool(leftovers(model_dir, commit)) or _must_fold(model_dir, commit, is_folding)


def _must_fold(model_dir: Path, commit: Commit | None, is_folding: bool) -> bool:
    """Shards not as the commit left them: a fold was cut off, and is finished before anything else."""
    if commit is None or commit.delta is None:
        return False
    return is_folding or not is_current(model_dir, commit)


def repair(model_dir: Path, disk: Disk, is_folding: bool) -> Mended:
    commit = read_commit(model_dir)
    if not _needs_recovery(model_dir, commit, is_folding):
        return Mended()
    finished = folded = None
    if commit is not None and _is_unfinished(model_dir, commit):
        # The record's rename is visible but perhaps not durable: its directory's flush may be what failed,
        # and a flush is never retried. So it is written once more, before any shard goes into place.
        publish(model_dir, commit, disk)
        finish(model_dir, commit, disk)
        finished = commit.weight_version
    else:
        # Likewise where no shard is pending: whoever committed may have died before the flush, and an older
        # record must not come back to files that are gone, or to shards that have a later delta worked in.
        # Only flushed, since on a full disk what is to be removed is in the way of a new record.
        disk.sync_dir(model_dir / STATE_DIR)
    removed = clean(model_dir, commit, disk)
    if commit is not None and _must_fold(model_dir, commit, is_folding):
        commit = fold(model_dir, commit, disk)
        clean(model_dir, commit, disk)
        folded = commit.weight_version
    return Mended(finished, removed, folded)


def _is_unfinished(model_dir: Path, commit: Commit | None) -> bool:
    return commit is not None and pending_dir(model_dir, commit.serial).is_dir()


def finish(model_dir: Path, commit: Commit, disk: Disk) -> None:
    """Renames the shards of a durable commit into place. May be stopped anywhere and run again."""
    pending = pending_dir(model_dir, commit.serial)
    if pending.is_dir():
        for name, shard in commit.shards.items():
            if shard.pending and (pending / name).exists():
                disk.rename(pending / name, model_dir / name)
        # Before pending-<serial> goes: as long as it is there, recovery knows that there may be work.
        disk.sync_dir(model_dir)
        clean(model_dir, commit, disk)
        # It must not come back: its shards would go once more over files that someone has put there since.
        disk.sync_dir(model_dir / STATE_DIR)
    else:
        clean(model_dir, commit, disk)


def clean(model_dir: Path, commit: Commit | None, disk: Disk) -> list[str]:
    """Removes what belongs to no commit: temporaries, abandoned directories, files of old versions.

    Without a flush: what a power cut brings back belongs to no commit then either, and is removed again.
    """
    found = leftovers(model_dir, commit)
    for path in found:
        remove(path, disk)
    return [path.name for path in found]


def leftovers(model_dir: Path, commit: Commit | None) -> list[Path]:
    state_dir = model_dir / STATE_DIR
    if not state_dir.is_dir():
        return []
    needed: set[str] = commit.files() if commit else set()
    found = sorted(path for pattern in _OURS for path in state_dir.glob(pattern))
    found = [path for path in found if path.name not in needed]
    return [*found, *(path for path in sorted(state_dir.glob("snapshot-*")) if not is_locked(path))]


def remove(path: Path, disk: Disk) -> None:
    """A file, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            remove(child, disk)
        disk.rmdir(path)
    else:
        disk.unlink(path)
