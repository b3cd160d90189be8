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
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from apollo_ipc.checkpoint import history
from apollo_ipc.checkpoint.disk import DISK, Disk, OpenFile
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
from apollo_ipc.checkpoint.recovery import LOCK_WAIT_S, clean, finish, repair
from apollo_ipc.checkpoint.shards import Shard
from apollo_ipc.errors import CheckpointError

log = logging.getLogger(__name__)
SPACE_MARGIN_BYTES = 64 * 1024 * 1024
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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
    def create(self, name: str, mode: int = 0o600) -> Generator[OpenFile]:
        """A new shard in the pending directory, to be filled with `write`; durable when the block is left."""
        if not self._created:
            self._disk.mkdir(self.pending)
        with self._flushed(self.pending / name, mode) as file:
            yield file
            # The time of the last write: nothing writes to it after this.
            info = os.fstat(file.fd)
        self._created[name] = ShardRecord(info.st_size, info.st_mtime_ns, pending=True)

    @contextmanager
    def create_state(self, name: str) -> Generator[OpenFile]:
        """A new file of .apollo under its last name, which must hold this serial: no record knows it yet."""
        with self._flushed(state_path(self.model_dir, name), 0o600) as file:
            yield file

    @contextmanager
    def _flushed(self, path: Path, mode: int) -> Generator[OpenFile]:
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
        is_pinned: bool = False,
    ) -> Commit:
        """Makes the created files the checkpoint.

        shards: all of the model's, as read before the sync; tensors: digests of this version's; in_shards:
        digests of what the shards hold before it, where that was looked at; delta: for a commit that creates
        no shards; num_kept: older versions that stay restorable, beside the pinned one (see pin.py);
        is_pinned: whether this version takes the pin.

        Raises CheckpointError. If that happens after the record's rename, the commit stands (read_commit
        tells), and the next `begin` or `recover` finishes it.
        """
        assert not (delta and self._created), "a commit writes shards or a delta"
        before = self._before(in_shards)
        base = self.serial if self._created else (before.base if before else 0)
        candidates = [*self.previous.history] if self.previous else []
        undos = [*self.previous.undos] if self.previous else []
        pinned = self.previous.pinned if self.previous and before else None
        if before is None or not (num_kept or pinned is not None):
            candidates, undos = [], []
        else:
            if (before.tensors, before.weight_version) != (tensors, weight_version):
                candidates.append(before)
            if base != before.base:
                undos.append(Undo(before.base, base, kept=self._keep_shards(before.base)))
                if not undos[-1].kept:
                    candidates, undos = [], []
        pinned = weight_version if is_pinned else pinned
        kept_versions, kept_undos = history.keep(candidates, undos, base, num_kept, pinned)
        if pinned not in (weight_version, *(version.weight_version for version in kept_versions)):
            pinned = None
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
            pinned=pinned,
        )
        foreign = self._flush_foreign(shards, bool(kept_versions))
        if self._created:
            self._disk.sync_dir(self.pending)
        if self.previous is None or foreign:
            # The name `.apollo` itself: whoever made it may have died before it was flushed.
            self._disk.sync_dir(self.model_dir)
        self._disk.sync_dir(self.model_dir / STATE_DIR)  # names of the files that the record will speak of
        publish(self.model_dir, commit, self._disk)
        finish(self.model_dir, commit, self._disk)
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
def begin(model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOCK_WAIT_S) -> Generator[Transaction]:
    """Locks the directory, recovers it, and gives a transaction; what it has not committed is thrown away.

    Raises CheckpointError when the directory cannot be locked or written.
    """
    state_dir = model_dir / STATE_DIR
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such directory")
    if not state_dir.is_dir():
        disk.mkdir(state_dir)
    with disk.lock(state_dir / "lock", lock_wait_s):
        repair(model_dir, disk, is_folding=False)
        transaction = Transaction(model_dir, disk)
        try:
            yield transaction
        except BaseException:
            with suppress(CheckpointError):  # the reason is on its way up; recover cleans what is left
                # Asked of the disk: an interrupt may come right after the rename that commits.
                if read_commit(model_dir) == transaction.previous:
                    clean(model_dir, transaction.previous, disk)
            raise
