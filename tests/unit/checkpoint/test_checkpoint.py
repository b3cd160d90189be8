"""The commit protocol on plain bytes: no torch, so that children can be forked and killed cheaply."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from small_checkpoint import (
    NAMES,
    NEW,
    NEW_OPTIMIZER,
    OLD,
    assert_old_or_new,
    contents,
    make_model,
    make_synced,
    state_files,
    sync,
)
from stepped_disk import Crash, SteppedDisk

from apollo_ipc import checkpoint
from apollo_ipc.checkpoint import read_commit, recover, verify
from apollo_ipc.checkpoint.disk import DISK


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return make_model(tmp_path / "model")


# --- the normal way ---


def test_a_sync_replaces_the_shards_and_leaves_only_its_record(model_dir):
    old = contents(model_dir)
    inodes = {name: (model_dir / name).stat().st_ino for name in NAMES}
    sync(model_dir, {NAMES[1]: NEW[NAMES[1]]}, version=7)
    commit = read_commit(model_dir)
    assert (commit.weight_version, commit.applied_seq, commit.serial) == (7, 7, 1)
    assert contents(model_dir) == {NAMES[0]: old[NAMES[0]], NAMES[1]: old[NAMES[1]].replace(b"old", b"new")}
    assert (model_dir / NAMES[0]).stat().st_ino == inodes[NAMES[0]]
    assert state_files(model_dir) == {"commit.json"}
    assert verify(model_dir) == []


def test_the_same_weight_version_may_be_committed_twice(model_dir):
    sync(model_dir, NEW, version=3, optimizer=b"one")
    sync(model_dir, OLD, version=3, optimizer=b"two")
    assert read_commit(model_dir).serial == 2
    assert state_files(model_dir) == {"commit.json", "optimizer-2.safetensors"}
    assert verify(model_dir) == []


def test_every_file_is_flushed_before_the_commit_and_every_name_before_the_pending_directory_goes(model_dir):
    disk = SteppedDisk()
    sync(model_dir, disk=disk, optimizer=b"moments")
    steps = disk.steps
    commit = steps.index(("rename", "commit.json"))
    for name in (*NAMES, "optimizer-1.safetensors"):
        assert steps.index(("write", name)) < steps.index(("sync", name)) < commit
    for name in NAMES:
        assert commit < steps.index(("rename", name))
    assert steps.index(("sync", NAMES[1])) < steps.index(("sync_dir", "pending-1")) < commit
    assert steps.index(("sync_dir", "pending-1")) < steps.index(("sync_dir", ".apollo")) < commit
    assert steps.index(("sync", "commit.json.new")) < commit
    assert steps[commit + 1] == ("sync_dir", ".apollo")
    last_shard, gone = steps.index(("rename", NAMES[1])), steps.index(("rmdir", "pending-1"))
    assert ("sync_dir", "model") in steps[last_shard:gone]


def test_a_reader_that_holds_the_old_shard_open_keeps_the_old_bytes(model_dir):
    old = contents(model_dir)
    with (model_dir / NAMES[0]).open("rb") as reader:
        sync(model_dir)
        assert reader.read() == old[NAMES[0]]
    assert contents(model_dir)[NAMES[0]] != old[NAMES[0]]


def test_a_symlinked_shard_becomes_a_file_and_its_blob_stays(tmp_path, model_dir):
    """The layout of the Hugging Face cache: snapshots/<revision>/model.safetensors -> ../../blobs/<hash>."""
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    (model_dir / NAMES[0]).rename(blob)
    (model_dir / NAMES[0]).symlink_to("../blobs/0123")
    old = blob.read_bytes()
    sync(model_dir)
    assert blob.read_bytes() == old
    assert not (model_dir / NAMES[0]).is_symlink()
    assert (model_dir / NAMES[0]).read_bytes() == old.replace(b"old", b"new")


def test_a_shard_keeps_its_permissions(model_dir):
    (model_dir / NAMES[0]).chmod(0o664)
    sync(model_dir)
    assert (model_dir / NAMES[0]).stat().st_mode & 0o777 == 0o664


# --- crashes ---


def test_a_sync_that_stops_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path):
    template, old, new = make_synced(tmp_path / "template")
    complete = SteppedDisk()
    sync(shutil.copytree(template, tmp_path / "complete"), version=2, disk=complete, optimizer=NEW_OPTIMIZER)
    versions = []
    for stop_at in range(len(complete.steps)):
        model_dir = shutil.copytree(template, tmp_path / f"stop-{stop_at}")
        with pytest.raises(Crash):
            sync(model_dir, version=2, disk=SteppedDisk(stop_at), optimizer=NEW_OPTIMIZER)
        recover(model_dir)
        versions.append(assert_old_or_new(model_dir, old, new))
    commit = complete.steps.index(("rename", "commit.json"))
    assert versions == [1] * (commit + 1) + [2] * (len(versions) - commit - 1)


def test_a_recovery_that_stops_at_any_operation_is_finished_by_the_next(tmp_path):
    template, old, new = make_synced(tmp_path / "template")
    complete = SteppedDisk()
    sync(shutil.copytree(template, tmp_path / "complete"), version=2, disk=complete, optimizer=NEW_OPTIMIZER)
    num_tried = 0
    for stop_at in range(len(complete.steps)):
        crashed = shutil.copytree(template, tmp_path / f"stop-{stop_at}")
        with pytest.raises(Crash):
            sync(crashed, version=2, disk=SteppedDisk(stop_at), optimizer=NEW_OPTIMIZER)
        recovery = SteppedDisk()
        recover(shutil.copytree(crashed, tmp_path / f"recovered-{stop_at}"), disk=recovery)
        for second_stop in range(len(recovery.steps)):
            model_dir = shutil.copytree(crashed, tmp_path / f"stop-{stop_at}-{second_stop}")
            with pytest.raises(Crash):
                recover(model_dir, disk=SteppedDisk(second_stop))
            recover(model_dir)
            assert_old_or_new(model_dir, old, new)
            num_tried += 1
    assert num_tried > 50


class DyingDisk(SteppedDisk):
    def stop(self) -> None:
        os._exit(9)


def test_a_process_that_dies_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path):
    """As above with real deaths: no handler and no `finally` runs, and the kernel drops the lock."""
    template, old, new = make_synced(tmp_path / "template")
    versions, stop_at, status = [], 0, None
    while status != 0:
        model_dir = shutil.copytree(template, tmp_path / f"stop-{stop_at}")
        pid = os.fork()
        if pid == 0:
            try:
                sync(model_dir, version=2, disk=DyingDisk(stop_at), optimizer=NEW_OPTIMIZER)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 9)
        recover(model_dir)
        versions.append(assert_old_or_new(model_dir, old, new))
        stop_at += 1
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}


def test_the_next_sync_needs_no_recovery_by_hand(tmp_path):
    template, _, new = make_synced(tmp_path / "template")
    complete = SteppedDisk()
    sync(shutil.copytree(template, tmp_path / "complete"), version=2, disk=complete)
    for stop_at in range(len(complete.steps)):
        model_dir = shutil.copytree(template, tmp_path / f"stop-{stop_at}")
        with pytest.raises(Crash):
            sync(model_dir, version=2, disk=SteppedDisk(stop_at))
        sync(model_dir, version=3)
        assert contents(model_dir) == new
        assert read_commit(model_dir).weight_version == 3
        assert state_files(model_dir) == {"commit.json"}


def test_an_unfinished_pending_directory_is_thrown_away(tmp_path):
    model_dir, old, new = make_synced(tmp_path / "model")
    pending = model_dir / ".apollo" / "pending-2"
    pending.mkdir()
    (pending / NAMES[0]).write_bytes(b"half")
    (model_dir / ".apollo" / "commit.json.new").write_bytes(b"{")
    recovery = recover(model_dir)
    assert recovery.finished_version is None
    assert set(recovery.removed) == {"pending-2", "commit.json.new"}
    assert_old_or_new(model_dir, old, new)


def test_recovery_without_anything_to_do_touches_nothing(model_dir, monkeypatch):
    disk = SteppedDisk()
    assert recover(model_dir, disk=disk) == checkpoint.Mended()
    assert not (model_dir / ".apollo").exists()
    assert disk.steps == []
    sync(model_dir)
    with DISK.lock(model_dir / ".apollo" / "lock", 0.0):
        assert recover(model_dir, disk=disk, lock_wait_s=0.0) == checkpoint.Mended()
    assert disk.steps == [("sync_dir", ".apollo")]
