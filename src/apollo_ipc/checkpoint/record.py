"""commit.json: the one record that says which bytes are the checkpoint, and which older ones can be had.

    MODEL_DIR/.apollo/commit.json   a Commit: the present recovery point, and those that stay restorable

It is replaced whole, by rename. A file in .apollo that it does not name belongs to nobody (see transaction).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.checkpoint.shards import check_plain
from apollo_ipc.errors import CheckpointError
from apollo_ipc.sealed import Damaged, seal, unseal

COMMIT_FORMAT = 2
READABLE_FORMATS = (1, 2)  # 1 had neither deltas nor history: its records are a full sync's without them
STATE_DIR = ".apollo"


class ShardRecord(msgspec.Struct, frozen=True):
    """A shard as the commit left it. Another size or mtime: someone else has replaced the file since."""

    size_bytes: int
    mtime_ns: int
    pending: bool = False  # written by this commit, so it may still be in pending-<serial>


class FileRecord(msgspec.Struct, frozen=True):
    """A file in .apollo."""

    name: str
    size_bytes: int
    digest: str  # xxh3_128 of the whole file, hex


class DeltaTensor(msgspec.Struct, frozen=True):
    """Bytes `start` to `end` of a delta file turn a tensor of digest `base` into one of digest `result`."""

    start: int
    end: int
    base: str
    result: str


class Delta(msgspec.Struct, frozen=True):
    """Tensors that differ, as differences (see delta.py). is_reverse: read from result to base."""

    file: FileRecord
    tensors: dict[str, DeltaTensor]
    is_reverse: bool = False

    def turn(self) -> Delta:
        """The same file, the other way round: a difference can be added and taken away."""
        return Delta(self.file, self.tensors, not self.is_reverse)

    def digests(self, name: str) -> tuple[str, str]:
        """(of what it is applied to, of what comes out), as read in this direction."""
        tensor = self.tensors[name]
        return (tensor.result, tensor.base) if self.is_reverse else (tensor.base, tensor.result)


class Version(msgspec.Struct, frozen=True):
    """A recovery point: weights, optimizer state and applied jobs that belong together.

    The weights are the shards as commit `base` left them, with `delta` applied where there is one.
    """

    serial: int  # of the commit; 0: what was in the directory before the first sync
    base: int  # the commit that last wrote shards; 0: none has
    weight_version: int
    applied_seq: int  # highest job seq whose whole effect is in these weights
    committed_at: float  # seconds since the epoch
    tensors: dict[str, str]  # name -> xxh3_128 (hex) of its bytes in this version
    delta: Delta | None = None
    optimizer: FileRecord | None = None
    extra: dict[str, Any] = {}  # the worker's own; JSON values (a NaN comes back as None)


class Undo(msgspec.Struct, frozen=True):
    """How the shards of base `base` come back from those of the next one, `newer`.

    kept: these shards, whole, in old-<base>/ (right after a full sync). delta: differences (once compacted).
    A tensor that neither names is the same in both.
    """

    base: int
    newer: int
    kept: list[str] = []
    delta: Delta | None = None


class Commit(msgspec.Struct, frozen=True):
    """Written by the worker at each sync; read by recovery (vLLM and worker), the job queue and the CLI."""

    format: int
    serial: int
    weight_version: int
    applied_seq: int
    committed_at: float
    shards: dict[str, ShardRecord]
    tensors: dict[str, str]
    optimizer: FileRecord | None = None
    extra: dict[str, Any] = {}
    base: int = 0
    delta: Delta | None = None
    history: list[Version] = []  # restorable, oldest first; never this commit itself
    undos: list[Undo] = []  # oldest first; a chain that ends at this commit's base
    pinned: int | None = None  # the weight version that stays restorable however many commits follow

    @property
    def version(self) -> Version:
        """This commit as it will stand in the history of the next one."""
        return Version(
            serial=self.serial,
            base=self.base,
            weight_version=self.weight_version,
            applied_seq=self.applied_seq,
            committed_at=self.committed_at,
            tensors=self.tensors,
            delta=self.delta,
            optimizer=self.optimizer,
            extra=self.extra,
        )

    def in_shard(self, name: str) -> str | None:
        """Digest of tensor `name` as it lies in the shards: another than its own where the delta has it."""
        if self.delta is not None and name in self.delta.tensors:
            return self.delta.tensors[name].base
        return self.tensors.get(name)

    def files(self) -> set[str]:
        """Names in .apollo that this record needs, beside pending-<serial>."""
        names = {f"old-{undo.base}" for undo in self.undos if undo.kept}
        names |= {version.optimizer.name for version in [self.version, *self.history] if version.optimizer}
        names |= {delta.file.name for delta in self.deltas()}
        return names

    def deltas(self) -> Iterator[Delta]:
        for one in [self.version, *self.history, *self.undos]:
            if one.delta is not None:
                yield one.delta


def read_commit(model_dir: Path) -> Commit | None:
    """The last commit, or None where nothing was ever synced. Raises CheckpointError for a damaged record."""
    path = model_dir / STATE_DIR / "commit.json"
    try:
        commit = unseal(path.read_bytes(), Commit)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except Damaged as error:
        raise CheckpointError(f"{path}: not a commit record: {error}") from None
    if commit.format not in READABLE_FORMATS:
        raise CheckpointError(f"{path}: format {commit.format}, this version reads {COMMIT_FORMAT}")
    kept = [name for undo in commit.undos for name in undo.kept]
    for name in [*commit.shards, *commit.files(), *kept]:
        check_plain(name, path)
    return commit


def is_current(model_dir: Path, commit: Commit) -> bool:
    """Whether the shards in place are those that `commit` left, by size and mtime. Ask after `recover`."""
    return all(is_as_left(model_dir / name, shard) for name, shard in commit.shards.items())


def is_as_left(path: Path, record: ShardRecord) -> bool:
    try:
        info = path.stat()
    except FileNotFoundError:
        return False
    return (info.st_size, info.st_mtime_ns) == (record.size_bytes, record.mtime_ns)


def state_path(model_dir: Path, name: str) -> Path:
    return model_dir / STATE_DIR / name


def pending_dir(model_dir: Path, serial: int) -> Path:
    return state_path(model_dir, f"pending-{serial}")


def publish(model_dir: Path, commit: Commit, disk: Disk) -> None:
    """Replaces the record, durably: **its rename is the commit**. Raises CheckpointError.

    The files that it speaks of are there whenever it is: their names must be durable before.
    """
    file = disk.create(state_path(model_dir, "commit.json.new"), 0o600)
    try:
        disk.write(file, seal(commit))
        disk.sync(file)
    finally:
        disk.close(file)
    disk.rename(file.path, state_path(model_dir, "commit.json"))
    disk.sync_dir(model_dir / STATE_DIR)
