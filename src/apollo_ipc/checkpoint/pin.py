"""One version that stays restorable however many syncs follow: the last that was measured to be good, say.

The newest `checkpoint.history` versions come and go with the syncs; the pin is carried from commit to commit.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from apollo_ipc.checkpoint import history
from apollo_ipc.checkpoint.disk import DISK, Disk
from apollo_ipc.checkpoint.record import STATE_DIR, publish, read_commit
from apollo_ipc.checkpoint.recovery import LOCK_WAIT_S, repair
from apollo_ipc.errors import CheckpointError, UserError


def pin_version(
    model_dir: Path, weight_version: int | None, *, disk: Disk = DISK, lock_wait_s: float = LOCK_WAIT_S
) -> int | None:
    """Moves the pin to `weight_version`, or takes it away (None). Returns where it was.

    Beside a running worker too: only the record changes. What lost the pin goes with the next sync, where it
    is older than the versions that are kept anyway. Raises UserError for a version that is not there,
    CheckpointError where the record cannot be written.
    """
    if read_commit(model_dir) is None:
        raise UserError("nothing was synced here yet, so there is no version")
    with disk.lock(model_dir / STATE_DIR / "lock", lock_wait_s):
        repair(model_dir, disk, is_folding=False)
        commit = read_commit(model_dir)
        if commit is None:
            raise CheckpointError(f"{model_dir}: the record of syncs was removed meanwhile")
        if weight_version is not None:
            history.find(commit, weight_version)
        if weight_version != commit.pinned:
            publish(model_dir, msgspec.structs.replace(commit, pinned=weight_version), disk)
        return commit.pinned
