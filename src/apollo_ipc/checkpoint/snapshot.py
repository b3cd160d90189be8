"""A directory that stays as it is while a command reads it, however many syncs go on meanwhile.

    MODEL_DIR/.apollo/snapshot-<serial>-<pid>/     second names (hard links) of the model's files

It costs no bytes: a sync never writes into a file that has a name, it replaces the name. The directory is
held by a flock that the command inherits: one whose maker has died is removed once the command has ended.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from apollo_ipc.checkpoint.disk import DISK, Disk
from apollo_ipc.checkpoint.record import STATE_DIR, Commit, read_commit
from apollo_ipc.checkpoint.recovery import LOCK_WAIT_S, recover, remove
from apollo_ipc.errors import CheckpointError
from apollo_ipc.hold import try_lock
from apollo_ipc.sealed import seal


class Snapshot(msgspec.Struct, frozen=True):
    path: Path
    held_by: int  # a descriptor to be inherited by whoever reads `path`
    commit: Commit | None  # None where nothing was ever synced


@contextmanager
def snapshot(model_dir: Path, *, disk: Disk = DISK, lock_wait_s: float = LOCK_WAIT_S) -> Generator[Snapshot]:
    """The present version, without its history, under names of its own for the block.

    A copy of it is a checkpoint directory like the model's: where it has a delta, `recover` works it in.
    Raises CheckpointError, also where the file system knows no hard links.
    """
    state_dir = model_dir / STATE_DIR
    if not state_dir.is_dir():
        disk.mkdir(state_dir)
    recover(model_dir, disk=disk, lock_wait_s=lock_wait_s, is_folding=False)
    # Readers among themselves; a sync that wants to commit waits for the moment that this takes.
    with disk.lock(state_dir / "lock", lock_wait_s, is_shared=True):
        commit = read_commit(model_dir)
        path = state_dir / f"snapshot-{commit.serial if commit else 0}-{os.getpid()}"
        if path.exists():
            raise CheckpointError(f"{path} is there already: one snapshot a process")
        disk.mkdir(path)
        held_by = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try_lock(held_by, path)
            _fill(model_dir, path, commit, disk)
        except BaseException:
            _drop(path, held_by, disk)
            raise
    try:
        yield Snapshot(path, held_by, commit)
    finally:
        _drop(path, held_by, disk)


def _drop(path: Path, held_by: int, disk: Disk) -> None:
    try:
        remove(path, disk)
    finally:
        os.close(held_by)  # whatever is left is then nobody's, and the next recovery removes it


def command_for(command: list[str], taken: Snapshot, model_dir: Path) -> tuple[list[str], dict[str, str]]:
    """The operator's command with {snapshot}, {model_dir} and {weight_version} filled in; the same as
    environment variables APOLLO_SNAPSHOT, APOLLO_MODEL_DIR and APOLLO_WEIGHT_VERSION."""
    values = {
        "snapshot": str(taken.path),
        "model_dir": str(model_dir),
        "weight_version": str(taken.commit.weight_version if taken.commit else 0),
    }
    filled: list[str] = []
    for part in command:
        for name, value in values.items():
            part = part.replace("{" + name + "}", value)
        filled.append(part)
    return filled, {f"APOLLO_{name.upper()}": value for name, value in values.items()}


def _fill(model_dir: Path, path: Path, commit: Commit | None, disk: Disk) -> None:
    for folder, folders, files in os.walk(model_dir):
        source = Path(folder)
        target = path / source.relative_to(model_dir)
        if source == model_dir:
            folders.remove(STATE_DIR)
        for name in folders:
            disk.mkdir(target / name)
        for name in files:
            disk.link(source / name, target / name)
    if commit is None:
        return
    disk.mkdir(path / STATE_DIR)
    present = msgspec.structs.replace(commit, history=[], undos=[], pinned=None)
    for name in present.files():
        disk.link(model_dir / STATE_DIR / name, path / STATE_DIR / name)
    file = disk.create(path / STATE_DIR / "commit.json", 0o600)
    try:
        disk.write(file, seal(present))
    finally:
        disk.close(file)
