"""Disks that fail or cannot be written, and checkpoints that were damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from small_checkpoint import (
    NAMES,
    NEW_OPTIMIZER,
    assert_old_or_new,
    contents,
    make_model,
    make_synced,
    state_files,
    sync,
)
from stepped_disk import SteppedDisk

from apollo_ipc import checkpoint
from apollo_ipc.checkpoint import begin, read_commit, recover, shard_index, verify
from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.errors import CheckpointError


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return make_model(tmp_path / "model")


# --- errors of the disk ---


def failing(error: int, function: str, path_part: str, monkeypatch) -> list[str]:
    """Makes `os.<function>` fail on file descriptors of paths with `path_part`; returns the calls it saw."""
    real, calls = getattr(os, function), []

    def fail(fd, *args):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path_part not in path:
            return real(fd, *args)
        calls.append(path)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, function, fail)
    return calls


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    ("function", "path_part"),
    [
        ("write", "pending-2/model-00002"),
        ("fdatasync", "pending-2/model-00001"),
        ("fsync", "pending-2"),
        ("write", "commit.json.new"),
        ("fdatasync", "commit.json.new"),
    ],
)
def test_an_error_before_the_commit_leaves_the_old_and_is_not_retried(
    tmp_path, monkeypatch, error, function, path_part
):
    model_dir, old, new = make_synced(tmp_path / "model")
    calls = failing(error, function, path_part, monkeypatch)
    with pytest.raises(CheckpointError, match=os.strerror(error)):
        sync(model_dir, version=2, optimizer=NEW_OPTIMIZER)
    assert len(calls) == 1
    monkeypatch.undo()
    assert assert_old_or_new(model_dir, old, new) == 1
    sync(model_dir, version=2, optimizer=NEW_OPTIMIZER)
    assert assert_old_or_new(model_dir, old, new) == 2


class OneFlushFails(SteppedDisk):
    """The flush of .apollo right after the commit's rename fails, once."""

    def sync_dir(self, path: Path) -> None:
        self.steps.append(("sync_dir", path.name))
        if self.steps[-2:] == [("rename", "commit.json"), ("sync_dir", ".apollo")]:
            raise CheckpointError("cannot flush")
        Disk.sync_dir(self, path)


def test_a_commit_that_may_not_be_durable_is_written_again_before_its_shards_go_into_place(tmp_path):
    model_dir, old, new = make_synced(tmp_path / "model")
    with pytest.raises(CheckpointError, match="cannot flush"):
        sync(model_dir, version=2, disk=OneFlushFails(), optimizer=NEW_OPTIMIZER)
    assert contents(model_dir) == old
    assert "pending-2" in state_files(model_dir)
    disk = SteppedDisk()
    assert recover(model_dir, disk=disk).finished_version == 2
    assert disk.steps.index(("sync", "commit.json.new")) < disk.steps.index(("rename", NAMES[0]))
    assert assert_old_or_new(model_dir, old, new) == 2


def test_too_little_space_is_refused_with_numbers(model_dir, monkeypatch):
    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: 1_000_000)
    with (
        pytest.raises(CheckpointError, match=r"1,000,000 bytes free.*needs 2,000"),
        begin(model_dir) as transaction,
    ):
        transaction.require_space(2_000)
    assert state_files(model_dir) == set()


def read_only(monkeypatch) -> None:
    """A read-only file system, also for root, whom no permission bit stops."""
    real_open = os.open

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_to_read(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_to_read)
    for function in ("mkdir", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, function, refuse)


def test_a_read_only_directory_is_refused_in_words(model_dir, monkeypatch):
    read_only(monkeypatch)
    assert recover(model_dir) == checkpoint.Mended()
    with pytest.raises(
        CheckpointError, match=r"Read-only file system; a checkpoint can only be synced into a wri"
    ):
        sync(model_dir)


def test_a_read_only_directory_may_hold_leftovers_but_no_unfinished_commit(tmp_path, monkeypatch):
    harmless, _, _ = make_synced(tmp_path / "harmless")
    (harmless / ".apollo" / "pending-2").mkdir()
    unfinished, _, _ = make_synced(tmp_path / "unfinished")
    with pytest.raises(CheckpointError):
        sync(unfinished, version=2, disk=OneFlushFails())
    read_only(monkeypatch)
    assert recover(harmless) == checkpoint.Mended()
    with pytest.raises(CheckpointError, match="Read-only"):
        recover(unfinished)


def test_a_second_sync_is_kept_out_while_the_first_runs(model_dir):
    with begin(model_dir), pytest.raises(CheckpointError, match="another process is using"):
        sync(model_dir)
    sync(model_dir)


# --- verification ---


def test_a_flipped_byte_is_named(model_dir):
    sync(model_dir)
    where = shard_index(model_dir)["b"]
    with (model_dir / NAMES[0]).open("r+b") as file:
        file.seek(where.start + 5)
        byte = file.read(1)
        file.seek(where.start + 5)
        file.write(bytes([byte[0] ^ 1]))
    (problem,) = verify(model_dir)
    assert (problem.shard, problem.tensor) == (NAMES[0], "b")


def test_missing_shards_cut_shards_and_damaged_optimizers_are_problems(model_dir):
    sync(model_dir, optimizer=b"moments")
    os.truncate(model_dir / NAMES[0], 200)
    (model_dir / NAMES[1]).unlink()
    (model_dir / ".apollo" / "optimizer-1.safetensors").write_bytes(b"Moments")
    problems = verify(model_dir)
    assert [problem.shard for problem in problems if problem.tensor is None] == [
        *NAMES,
        "optimizer-1.safetensors",
    ]
    assert [problem.tensor for problem in problems if problem.tensor] == ["a", "b", "c"]


def test_nothing_can_be_verified_before_the_first_sync(model_dir):
    with pytest.raises(CheckpointError, match="nothing was synced"):
        verify(model_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a commit record"),
        (b"[" * 100_000, "not a commit record"),
        (b'{"format": 1}', "not a commit record"),
        (
            b'{"format":9,"serial":1,"weight_version":1,"applied_seq":1,"committed_at":1,"shards":{},"tensors":{}}',
            "format 9",
        ),
        (
            b'{"format":1,"serial":1,"weight_version":1,"applied_seq":1,"committed_at":1,"tensors":{},'
            b'"shards":{"../../etc/passwd":{"size_bytes":1,"mtime_ns":1,"pending":true}}}',
            "not a plain file name",
        ),
    ],
)
def test_a_bad_commit_record_is_refused(model_dir, content, message):
    (model_dir / ".apollo").mkdir()
    (model_dir / ".apollo" / "commit.json").write_bytes(content)
    for function in (read_commit, recover, verify):
        with pytest.raises(CheckpointError, match=message):
            function(model_dir)
