"""The model directory is the checkpoint: what it holds, how a sync is committed, how a crash is repaired.

    MODEL_DIR/model-00001-of-00002.safetensors ...   the shards, always complete, in HF names
    MODEL_DIR/.apollo/commit.json                    the commit record (Commit below)
    MODEL_DIR/.apollo/optimizer-<serial>.safetensors the optimizer state of that commit
    MODEL_DIR/.apollo/pending-<serial>/              a sync in the making, or one to be finished
    MODEL_DIR/.apollo/lock                           flock: one writer

A sync writes changed shards and optimizer state into pending-<serial>, flushes them, and renames commit.json
over the old one: **that rename is the commit**. Then the files are renamed into place. A crash before the
commit leaves pending files that no record mentions (thrown away); one after it leaves pending files that the
record mentions (renamed). `serial` grows with every commit: weight_version may stand still between two.

No shard is ever opened for writing, so a reader that holds one open keeps the bytes it began with.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from apollo_ipc.disk import DISK, Disk, OpenFile
from apollo_ipc.errors import CheckpointError
from apollo_ipc.shards import Shard, ShardTensor, check_plain, file_digest, read_shard, shard_index

__all__ = [
    "Commit",
    "FileRecord",
    "Problem",
    "Recovery",
    "ShardRecord",
    "ShardTensor",
    "Transaction",
    "begin",
    "is_current",
    "read_commit",
    "recover",
    "shard_index",
    "verify",
]

COMMIT_FORMAT = 1
STATE_DIR = ".apollo"
SPACE_MARGIN_BYTES = 64 * 1024 * 1024
LOCK_WAIT_S = 60.0


# --- the commit record ---


class ShardRecord(msgspec.Struct, frozen=True):
    """A shard as the commit left it. Another size or mtime: someone else has replaced the file since."""

    size_bytes: int
    mtime_ns: int
    pending: bool = False  # written by this commit, so it may still be in pending-<serial>


class FileRecord(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int
    digest: str  # xxh3_128 of the whole file, hex


class Commit(msgspec.Struct, frozen=True):
    """Written by the worker at each sync; read by recovery (vLLM and worker), the job queue and the CLI."""

    format: int
    serial: int
    weight_version: int
    applied_seq: int  # highest job seq whose whole effect is in these weights
    committed_at: float  # seconds since the epoch
    shards: dict[str, ShardRecord]
    tensors: dict[str, str]  # name -> xxh3_128 (hex) of its bytes in the shard
    optimizer: FileRecord | None = None
    extra: dict[str, Any] = {}  # the worker's own; JSON values (a NaN comes back as None)


def read_commit(model_dir: Path) -> Commit | None:
    """The last commit, or None where nothing was ever synced. Raises CheckpointError for a damaged record."""
    path = model_dir / STATE_DIR / "commit.json"
    try:
        commit = msgspec.json.decode(path.read_bytes(), type=Commit)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a commit record: {error}") from None
    if commit.format != COMMIT_FORMAT:
        raise CheckpointError(f"{path}: format {commit.format}, this version reads {COMMIT_FORMAT}")
    for name in [*commit.shards, *([commit.optimizer.name] if commit.optimizer else [])]:
        check_plain(name, path)
    return commit


def is_current(model_dir: Path, commit: Commit) -> bool:
    """Whether the shards in place are those that `commit` left, by size and mtime. Ask after `recover`."""
    for name, shard in commit.shards.items():
        try:
            info = (model_dir / name).stat()
        except FileNotFoundError:
            return False
        if (info.st_size, info.st_mtime_ns) != (shard.size_bytes, shard.mtime_ns):
            return False
    return True


def pending_dir(model_dir: Path, serial: int) -> Path:
    return model_dir / STATE_DIR / f"pending-{serial}"


# --- the protocol ---


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
                f"{self.model_dir}: {free:,} bytes free, but the changed shards need {needed_bytes:,} "
                f"and a margin of {SPACE_MARGIN_BYTES:,}; free some space"
            )

    @contextmanager
    def create(self, name: str, mode: int = 0o600) -> Iterator[OpenFile]:
        """A new file in the pending directory, to be filled with `write`; durable when the block is left."""
        if not self._created:
            self._disk.mkdir(self.pending)
        file = self._disk.create(self.pending / name, mode)
        try:
            yield file
            self._disk.sync(file)
            info = os.fstat(file.fd)
        finally:
            self._disk.close(file)
        self._created[name] = ShardRecord(info.st_size, info.st_mtime_ns, pending=True)

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
    ) -> Commit:
        """Makes the created files the checkpoint. `shards`: all of the model's, as read before the sync.

        Raises CheckpointError. If that happens after the record's rename, the commit stands (read_commit
        tells), and the next `begin` or `recover` finishes it.
        """
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
        )
        if self._created:
            self._disk.sync_dir(self.pending)
        # The name `.apollo` itself: whoever made it may have died before it was flushed.
        self._disk.sync_dir(self.model_dir)
        _publish(self.model_dir, commit, self._disk)
        _finish(self.model_dir, commit, self._disk)
        return commit


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
        _recover(model_dir, disk)
        transaction = Transaction(model_dir, disk)
        try:
            yield transaction
        except BaseException:
            with suppress(CheckpointError):  # the reason is on its way up; recover cleans what is left
                # Asked of the disk: an interrupt may come right after the rename that commits.
                if read_commit(model_dir) == transaction.previous:
                    _clean(model_dir, transaction.previous, disk)
            raise


class Recovery(msgspec.Struct, frozen=True):
    """What recover had to do; all empty for a directory that was in order."""

    finished_version: int | None = None  # weight version of a commit whose files were renamed into place
    removed: list[str] = []  # leftovers in .apollo


def recover(model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOCK_WAIT_S) -> Recovery:
    """Finishes a committed sync, throws an unfinished one away. To be called before the shards are loaded.

    Idempotent, and free of writes where there is nothing to do. Raises CheckpointError when a committed sync
    cannot be finished (read-only directory), since the shards may then be of two versions.
    """
    commit = read_commit(model_dir)
    if not _leftovers(model_dir, commit):
        return Recovery()
    try:
        with disk.lock(model_dir / STATE_DIR / "lock", lock_wait_s):
            return _recover(model_dir, disk)
    except CheckpointError as error:
        read_only = getattr(error.__cause__, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM)
        if not read_only or _is_unfinished(model_dir, commit):
            raise
        return Recovery()  # what is left over there is no part of the checkpoint


def _recover(model_dir: Path, disk: Disk) -> Recovery:
    commit = read_commit(model_dir)
    finished = None
    if commit is not None and _is_unfinished(model_dir, commit):
        # The record's rename is visible but perhaps not durable: its directory's flush may be what failed,
        # and a flush is never retried. So it is written once more, before any shard goes into place.
        _publish(model_dir, commit, disk)
        _finish(model_dir, commit, disk)
        finished = commit.weight_version
    return Recovery(finished, _clean(model_dir, commit, disk))


def _is_unfinished(model_dir: Path, commit: Commit | None) -> bool:
    return commit is not None and pending_dir(model_dir, commit.serial).is_dir()


def _publish(model_dir: Path, commit: Commit, disk: Disk) -> None:
    """Replaces the commit record, durably."""
    state_dir = model_dir / STATE_DIR
    disk.sync_dir(state_dir)  # pending-<serial> must be there whenever the record that names it is
    file = disk.create(state_dir / "commit.json.new", 0o600)
    try:
        disk.write(file, msgspec.json.encode(commit))
        disk.sync(file)
    finally:
        disk.close(file)
    disk.rename(file.path, state_dir / "commit.json")
    disk.sync_dir(state_dir)


def _finish(model_dir: Path, commit: Commit, disk: Disk) -> None:
    """Renames the files of a durable commit into place. May be stopped anywhere and run again."""
    state_dir, pending = model_dir / STATE_DIR, pending_dir(model_dir, commit.serial)
    for name, shard in commit.shards.items():
        if shard.pending and (pending / name).exists():
            disk.rename(pending / name, model_dir / name)
    disk.sync_dir(model_dir)
    if commit.optimizer and (pending / commit.optimizer.name).exists():
        disk.rename(pending / commit.optimizer.name, state_dir / commit.optimizer.name)
    # Before pending-<serial> goes: as long as it is there, recovery knows that there may be work.
    disk.sync_dir(state_dir)
    _clean(model_dir, commit, disk)


def _clean(model_dir: Path, commit: Commit | None, disk: Disk) -> list[str]:
    """Removes what belongs to no commit: temporaries, abandoned pending directories, old optimizer files."""
    leftovers = _leftovers(model_dir, commit)
    for path in leftovers:
        if path.is_dir():
            for file in path.iterdir():
                disk.unlink(file)
            disk.rmdir(path)
        else:
            disk.unlink(path)
    if leftovers:
        disk.sync_dir(model_dir / STATE_DIR)
    return [path.name for path in leftovers]


def _leftovers(model_dir: Path, commit: Commit | None) -> list[Path]:
    state_dir = model_dir / STATE_DIR
    if not state_dir.is_dir():
        return []
    current = commit.optimizer.name if commit and commit.optimizer else None
    found = [path for pattern in ("pending-*", "optimizer-*") for path in state_dir.glob(pattern)]
    return [*(p for p in sorted(found) if p.name != current), *state_dir.glob("commit.json.new")]


# --- verification ---


class Problem(msgspec.Struct, frozen=True):
    shard: str
    tensor: str | None
    message: str


def verify(model_dir: Path) -> list[Problem]:
    """Reads every shard and the optimizer file and compares each digest with the commit record.

    Writes and locks nothing; if a sync commits meanwhile, starts again. Raises CheckpointError where there
    is no record to compare with.
    """
    while True:
        commit = read_commit(model_dir)
        if commit is None:
            raise CheckpointError(f"{model_dir}: nothing was synced here yet, so there is nothing to verify")
        problems = list(_problems(model_dir, commit))
        latest = read_commit(model_dir)
        if not problems or (latest and latest.serial == commit.serial):
            return problems


def _problems(model_dir: Path, commit: Commit) -> Iterator[Problem]:
    if _is_unfinished(model_dir, commit):
        name = pending_dir(model_dir, commit.serial).name
        yield Problem(name, None, "committed, but not all of its files are in place: run recover")
    seen = set()
    for name in commit.shards:
        try:
            shard = read_shard(model_dir / name)
        except CheckpointError as error:
            yield Problem(name, None, error.message)
            continue
        for tensor in shard.tensors:
            seen.add(tensor.name)
            found = file_digest(model_dir / name, tensor.start, tensor.end)
            if found != commit.tensors.get(tensor.name):
                recorded = commit.tensors.get(tensor.name, "no such tensor")
                yield Problem(name, tensor.name, f"digest {found}, the commit says {recorded}")
        if (size := commit.shards[name].size_bytes) != shard.size_bytes:
            yield Problem(name, None, f"{shard.size_bytes} bytes, the commit says {size}")
    for name in sorted(commit.tensors.keys() - seen):
        yield Problem("?", name, "in the commit, but in no readable shard")
    if commit.optimizer:
        path = model_dir / STATE_DIR / commit.optimizer.name
        if not path.exists() or file_digest(path, 0, path.stat().st_size) != commit.optimizer.digest:
            yield Problem(path.name, None, "missing or damaged optimizer state")
