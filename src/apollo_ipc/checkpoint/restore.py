"""An older version becomes the newest commit: nothing is rewound, so the step back can itself be undone."""

from __future__ import annotations

from pathlib import Path

from apollo_ipc.checkpoint import history
from apollo_ipc.checkpoint.disk import DISK, Disk
from apollo_ipc.checkpoint.record import STATE_DIR, Commit, is_as_left
from apollo_ipc.checkpoint.recovery import LOCK_WAIT_S, clean, recover
from apollo_ipc.checkpoint.shards import Shard, read_shards
from apollo_ipc.checkpoint.transaction import Transaction, begin
from apollo_ipc.errors import CheckpointError, UserError


def restore_version(
    model_dir: Path,
    weight_version: int,
    *,
    new_version: int = 0,
    applied_seq: int | None = None,
    num_kept: int = 0,
    disk: Disk = DISK,
    lock_wait_s: float = LOCK_WAIT_S,
) -> Commit:
    """Commits shards and optimizer state of `weight_version` as a new weight version: `new_version`, or more
    where the last commit has that already.

    applied_seq: jobs that are not to be trained again (default: those of the last commit); num_kept: versions
    that stay restorable, at least those that are there and the one that is left. Until the commit nothing
    is changed. Raises UserError for a version that is not kept, CheckpointError where it cannot be built.
    """
    # The present version as whole shards, so that only shards are to be replaced.
    recover(model_dir, disk=disk, lock_wait_s=lock_wait_s)
    with begin(model_dir, disk=disk, lock_wait_s=lock_wait_s) as transaction:
        before = transaction.previous
        if before is None:
            raise UserError("nothing was synced here yet, so there is no older version")
        version = history.find(before, weight_version)
        shards = read_shards(model_dir)
        for name in shards:
            if not is_as_left(model_dir / name, before.shards[name]):
                raise CheckpointError(
                    f"{model_dir / name} was replaced since the last sync; bring it back, or run "
                    "`apollo-ipc checkpoint forget` to start from the files as they are"
                )
        changed = [
            shard
            for shard in shards.values()
            if any(before.tensors.get(t.name) != version.tensors.get(t.name) for t in shard.tensors)
        ]
        transaction.require_space(sum(shard.size_bytes for shard in changed))
        reader = history.VersionReader(model_dir, before, version)
        for shard in changed:
            _write(transaction, shard, reader)
        return transaction.commit(
            weight_version=max(new_version, before.weight_version + 1),
            applied_seq=before.applied_seq if applied_seq is None else applied_seq,
            shards=shards,
            tensors=version.tensors,
            optimizer=version.optimizer,
            extra={
                **{key: version.extra[key] for key in ("optimizer_steps",) if key in version.extra},
                "queue_id": before.extra.get("queue_id"),
                "restored_from": weight_version,
                "undone_after": version.applied_seq,
            },
            in_shards=before.tensors,
            num_kept=max(num_kept, len(before.history) + 1),
            is_pinned=weight_version == before.pinned,  # the same weights, and fewer differences to keep
        )


def _write(transaction: Transaction, shard: Shard, reader: history.VersionReader) -> None:
    with transaction.create(shard.name, shard.mode) as file:
        transaction.write(file, shard.header)
        for tensor in shard.tensors:
            transaction.write(file, memoryview(reader.read(tensor)))


def forget(model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOCK_WAIT_S) -> bool:
    """Removes every record of syncs, with older versions and optimizer state; the shards stay as they are.

    For shards that were replaced on purpose. False where there was nothing. Raises CheckpointError.
    """
    state_dir = model_dir / STATE_DIR
    if not state_dir.is_dir():
        return False
    with disk.lock(state_dir / "lock", lock_wait_s):
        if not (state_dir / "commit.json").exists():
            return False
        disk.unlink(state_dir / "commit.json")
        disk.sync_dir(state_dir)
        clean(model_dir, None, disk)  # what no record names
        return True
