"""A delta commit's changes worked into the shards themselves, so that everything can load them.

Shard by shard: written beside, flushed, renamed. Until the record is replaced the delta stays in it, so a
fold that is cut off is run again, and each shard is asked by digest whether it is base or already result.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from apollo_ipc.checkpoint import history
from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.checkpoint.record import (
    Commit,
    Delta,
    ShardRecord,
    Undo,
    is_as_left,
    publish,
    state_path,
)
from apollo_ipc.checkpoint.shards import Shard, file_digest, read_blocks, read_shard
from apollo_ipc.errors import CheckpointError


def fold(model_dir: Path, commit: Commit, disk: Disk) -> Commit:
    """The commit whose shards hold what `commit` says with its delta; the same version. Under the lock.

    Older versions stay restorable: the delta, read the other way round, leads back to the shards before.
    Raises CheckpointError, also where a shard is neither base nor result.
    """
    delta = commit.delta
    assert delta is not None
    records = dict(commit.shards)
    for name in commit.shards:
        shard = read_shard(model_dir / name)
        touched = [tensor.name for tensor in shard.tensors if tensor.name in delta.tensors]
        if touched and not _is_result(model_dir, shard, commit.shards[name], delta):
            _write_result(model_dir, shard, commit, disk)
        info = (model_dir / name).stat()
        records[name] = ShardRecord(info.st_size, info.st_mtime_ns)
    disk.sync_dir(model_dir)  # every shard under its name, before the record that says so
    serial = commit.serial + 1
    undos = [*commit.undos, Undo(commit.base, serial, delta=delta.turn())]
    kept, undos = history.keep(commit.history, undos, serial, len(commit.history), commit.pinned)
    folded = msgspec.structs.replace(
        commit, serial=serial, base=serial, shards=records, delta=None, history=kept, undos=undos
    )
    publish(model_dir, folded, disk)
    return folded


def _is_result(model_dir: Path, shard: Shard, record: ShardRecord, delta: Delta) -> bool:
    """Whether a fold that was cut off has replaced this shard. Raises CheckpointError for another file."""
    path = model_dir / shard.name
    if is_as_left(path, record):
        return False
    states: set[bool] = set()
    for tensor in shard.tensors:
        if tensor.name in delta.tensors:
            found = file_digest(path, tensor.start, tensor.end)
            base, result = delta.digests(tensor.name)
            if found not in (base, result):
                raise CheckpointError(
                    f"{path}: {tensor.name!r} is neither what the last full sync wrote nor what the delta "
                    f"{delta.file.name} makes of it, so the version committed last cannot be built. Bring "
                    "the file back; or remove .apollo to go on with the shards as they are"
                )
            states.add(found == result)
    if len(states) > 1:
        raise CheckpointError(
            f"{path}: some tensors are of the last full sync and some of the delta after it"
        )
    return states.pop()


def _write_result(model_dir: Path, shard: Shard, commit: Commit, disk: Disk) -> None:
    reader = history.VersionReader(model_dir, commit, commit.version)
    assert commit.delta is not None
    file = disk.create(state_path(model_dir, f"fold-{shard.name}"), shard.mode)
    try:
        disk.write(file, shard.header)
        for tensor in shard.tensors:
            if tensor.name in commit.delta.tensors:
                disk.write(file, memoryview(reader.read(tensor)))
            else:
                for block in read_blocks(model_dir / shard.name, tensor.start, tensor.end):
                    disk.write(file, block)
        disk.sync(file)
    finally:
        disk.close(file)
    disk.rename(file.path, model_dir / shard.name)
