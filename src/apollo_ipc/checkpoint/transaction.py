"""How a sync is committed, and how a crash is repaired. The model directory is the checkpoint:

    MODEL_DIR/model-00001-of-00002.safetensors ...   the shards, always complete, in HF names
    MODEL_DIR/.apollo/commit.json                    the commit record (record.py)
    MODEL_DIR/.apollo/optimizer-<serial>.safetensors the optimizer state of a commit
    MODEL_DIR/.apollo/delta-<serial>                 what a delta commit changes in the shards (delta.py)
    MODEL_DIR/.apollo/old-<base>/, undo-<base>-<n>   how older shards come back (history.py)
    MODEL_DIR/.apollo/pending-<serial>/              shards of a sync in the making, or of one to be finished
    MODEL_DIR/.apollo/lock                           flock: one writer, or readers

A full sync writes changed shards into pending-<serial>, a delta sync writes delta-<serial> and leaves the
shards alone. Both flush their files and rename commit.json over the old one: **that rename is the commit**.
Then the shards are renamed into place. A crash before the commit leaves files that no record mentions
(thrown away); one after it leaves pending shards that the record mentions (renamed). `serial` grows with
every commit: weight_version may stand still between two.

No shard is ever opened for writing, so a reader that holds one open keeps the bytes it began with.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from apollo_ipc.checkpoint import history
from apollo_ipc.checkpoint.disk import DISK, Disk, OpenFile, is_locked
from apollo_ipc.checkpoint.fold import fold
from apollo_ipc.checkpoint.record import (
    COMMIT_FORMAT,
    STATE_DIR,
    Commit,
    Delta,
    FileRecord,
    ShardRecord,
    Undo,
    Version,
    is_as_left,
    is_current,
    pending_dir,
    publish,
    read_commit,
    state_path,
)
from apollo_ipc.checkpoint.shards import Shard
from apollo_ipc.errors import CheckpointError

log = logging.getLogger(__name__)
SPACE_MARGIN_BYTES = 64 * 1024 * 1024
LOCK_WAIT_S = 60.0
LOAD_WAIT_S = 3600.0  # the flush of a large model on a slow disk; the lock of one that died is free at once
_OURS = ("pending-*", "optimizer-*", "delta-*", "undo-*", "old-*", "fold-*", "commit.json.new")
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Transaction:
    """One sync in the making, got from `begin`: create files, then commit."""

    def __init__(self, model_dir: Path, disk: Disk):
        self.model_dir = model_dir
        self.previous = read_commit(model_dir)
        self.serial = self.previous.serial + 1 if self.previous else 1
        self.pending = pending_dir(model_dir, self.serial)
        self.bytes_written = 0
        self._disk = disk
        self._created: dict[str, ShardRecord] = {}

    def require_space(self, needed_bytes: int) -> None:
        """Raises CheckpointError where `needed_bytes` and a margin do not fit beside what is there."""
        free = self._disk.free_bytes(self.model_dir)
        if free < needed_bytes + SPACE_MARGIN_BYTES:
            raise CheckpointError(
                f"{self.model_dir}: {free:,} bytes free, but this sync needs {needed_bytes:,} "
                f"and a margin of {SPACE_MARGIN_BYTES:,}; free some space"
            )

    @contextmanager
    def create(self, name: str, mode: int = 0o600) -> Iterator[OpenFile]:
        """A new shard in the pending directory, to be filled with `write`; durable when the block is left."""
        if not self._created:
            self._disk.mkdir(self.pending)
        with self._flushed(self.pending / name, mode) as file:
            yield file
            # The time of the last write: nothing writes to it after this.
            info = os.fstat(file.fd)
        self._created[name] = ShardRecord(info.st_size, info.st_mtime_ns, pending=True)

    @contextmanager
    def create_state(self, name: str) -> Iterator[OpenFile]:
        """A new file of .apollo under its last name, which must hold this serial: no record knows it yet."""
        with self._flushed(state_path(self.model_dir, name), 0o600) as file:
            yield file

    @contextmanager
    def _flushed(self, path: Path, mode: int) -> Iterator[OpenFile]:
        file = self._disk.create(path, mode)
        try:
            yield file
            self._disk.sync(file)
        finally:
            self._disk.close(file)

    def write(self, file: OpenFile, data: bytes | memoryview) -> None:
        self._disk.write(file, data)
        self.bytes_written += len(data)

    def commit(
        self,
        *,
        weight_version: int,
        applied_seq: int,
        shards: Mapping[str, Shard],
        tensors: dict[str, str],
        optimizer: FileRecord | None = None,
        extra: dict[str, Any] | None = None,
        delta: Delta | None = None,
        in_shards: dict[str, str] | None = None,
        num_kept: int = 0,
    ) -> Commit:
        """Makes the created files the checkpoint.

        shards: all of the model's, as read before the sync; tensors: digests of this version's; in_shards:
        digests of what the shards hold before it, where that was looked at; delta: for a commit that creates
        no shards; num_kept: older versions that stay restorable.

        Raises CheckpointError. If that happens after the record's rename, the commit stands (read_commit
        tells), and the next `begin` or `recover` finishes it.
        """
        assert not (delta and self._created), "a commit writes shards or a delta"
        before = self._before(in_shards)
        base = self.serial if self._created else (before.base if before else 0)
        candidates = [*self.previous.history] if self.previous else []
        undos = [*self.previous.undos] if self.previous else []
        if before is None or not num_kept:
            candidates, undos = [], []
        else:
            if (before.tensors, before.weight_version) != (tensors, weight_version):
                candidates.append(before)
            if base != before.base:
                undos.append(Undo(before.base, base, kept=self._keep_shards(before.base)))
                if not undos[-1].kept:
                    candidates, undos = [], []
        kept_versions, kept_undos = history.keep(candidates, undos, base, num_kept)
        commit = Commit(
            format=COMMIT_FORMAT,
            serial=self.serial,
            weight_version=weight_version,
            applied_seq=applied_seq,
            committed_at=time.time(),
            shards={
                name: self._created.get(name, ShardRecord(shard.size_bytes, shard.mtime_ns))
                for name, shard in shards.items()
            },
            tensors=tensors,
            optimizer=optimizer,
            extra=extra or {},
            base=base,
            delta=delta,
            history=kept_versions,
            undos=kept_undos,
        )
        foreign = self._flush_foreign(shards, bool(kept_versions))
        if self._created:
            self._disk.sync_dir(self.pending)
        if self.previous is None or foreign:
            # The name `.apollo` itself: whoever made it may have died before it was flushed.
            self._disk.sync_dir(self.model_dir)
        self._disk.sync_dir(self.model_dir / STATE_DIR)  # names of the files that the record will speak of
        publish(self.model_dir, commit, self._disk)
        _finish(self.model_dir, commit, self._disk)
        return commit

    def _flush_foreign(self, shards: Mapping[str, Shard], has_older: bool) -> bool:
        """Shards that no commit has left so, but of which this record or one of its older versions speaks:
        whoever put them there (a download, a copy) may not have flushed them. Whether there are any."""
        known = self.previous.shards if self.previous else {}
        foreign = [
            name
            for name in shards
            if (has_older or name not in self._created)
            and (name not in known or not is_as_left(self.model_dir / name, known[name]))
        ]
        for name in foreign:
            file = self._disk.open(self.model_dir / name)
            try:
                self._disk.sync(file)
            finally:
                self._disk.close(file)
        return bool(foreign)

    def _before(self, in_shards: dict[str, str] | None) -> Version | None:
        """The recovery point that this commit supersedes; None where the shards are no longer its own."""
        previous = self.previous
        if previous is None:
            return Version(0, 0, 0, 0, time.time(), in_shards) if in_shards else None
        if in_shards is None:
            return previous.version if is_current(self.model_dir, previous) else None
        if all(previous.in_shard(name) == digest for name, digest in in_shards.items()):
            return previous.version
        log.warning("%s: the shards were replaced since the last sync: older versions of them are dropped",
                    self.model_dir)  # fmt: skip
        return None

    def _keep_shards(self, base: int) -> list[str]:
        """Second names for the shards that will be replaced. Which those are; none where that cannot be."""
        old_dir = state_path(self.model_dir, f"old-{base}")
        self._disk.mkdir(old_dir)
        try:
            for name in self._created:
                self._disk.link(self.model_dir / name, old_dir / name)
        except CheckpointError as error:
            if getattr(error.__cause__, "errno", None) not in _NO_LINKS:
                raise
            log.warning("older versions are not kept: %s", error.message)
            return []
        self._disk.sync_dir(old_dir)
        return [*self._created]


@contextmanager
def begin(model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOCK_WAIT_S) -> Iterator[Transaction]:
    """Locks the directory, recovers it, and gives a transaction; what it has not committed is thrown away.

    Raises CheckpointError when the directory cannot be locked or written.
    """
    state_dir = model_dir / STATE_DIR
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such directory")
    if not state_dir.is_dir():
        disk.mkdir(state_dir)
    with disk.lock(state_dir / "lock", lock_wait_s):
        _recover(model_dir, disk, is_folding=False)
        transaction = Transaction(model_dir, disk)
        try:
            yield transaction
        except BaseException:
            with suppress(CheckpointError):  # the reason is on its way up; recover cleans what is left
                # Asked of the disk: an interrupt may come right after the rename that commits.
                if read_commit(model_dir) == transaction.previous:
                    clean(model_dir, transaction.previous, disk)
            raise


class Recovery(msgspec.Struct, frozen=True):
    """What recover had to do; all empty for a directory that was in order."""

    finished_version: int | None = None  # weight version of a commit whose files were renamed into place
    removed: list[str] = []  # leftovers in .apollo
    folded_version: int | None = None  # weight version whose delta was worked into the shards

    def __bool__(self) -> bool:
        return self != Recovery()


def recover(
    model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOCK_WAIT_S, is_folding: bool = True
) -> Recovery:
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
        return Recovery()
    try:
        with disk.lock(model_dir / STATE_DIR / "lock", lock_wait_s):
            return _recover(model_dir, disk, is_folding)
    except CheckpointError as error:
        read_only = getattr(error.__cause__, "errno", None) in _READ_ONLY
        must_fold = _must_fold(model_dir, commit, is_folding)
        if not read_only or must_fold or _is_unfinished(model_dir, commit):
            raise
        return Recovery()  # what is left over there is no part of the checkpoint


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
def loading(model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOAD_WAIT_S) -> Iterator[Recovery]:
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


def _recover(model_dir: Path, disk: Disk, is_folding: bool) -> Recovery:
    commit = read_commit(model_dir)
    if not _needs_recovery(model_dir, commit, is_folding):
        return Recovery()
    finished = folded = None
    if commit is not None and _is_unfinished(model_dir, commit):
        # The record's rename is visible but perhaps not durable: its directory's flush may be what failed,
        # and a flush is never retried. So it is written once more, before any shard goes into place.
        publish(model_dir, commit, disk)
        _finish(model_dir, commit, disk)
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
    return Recovery(finished, removed, folded)


def _is_unfinished(model_dir: Path, commit: Commit | None) -> bool:
    return commit is not None and pending_dir(model_dir, commit.serial).is_dir()


def _finish(model_dir: Path, commit: Commit, disk: Disk) -> None:
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
    needed = commit.files() if commit else set()
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
