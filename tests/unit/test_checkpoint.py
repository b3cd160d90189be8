"""The commit protocol on plain bytes: no torch, so that children can be forked and killed cheaply."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import xxhash
from stepped_disk import Crash, SteppedDisk

from apollo_ipc import checkpoint
from apollo_ipc.checkpoint import begin, read_commit, recover, shard_index, verify
from apollo_ipc.checkpoint.disk import DISK, Disk
from apollo_ipc.checkpoint.shards import read_shard, read_shards
from apollo_ipc.errors import CheckpointError

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OLD = {NAMES[0]: {"a": b"old-a-" * 10, "b": b"old-b-" * 20}, NAMES[1]: {"c": b"old-c-" * 30}}
NEW = {name: {t: data.replace(b"old", b"new") for t, data in shard.items()} for name, shard in OLD.items()}


def safetensors_bytes(tensors: dict[str, bytes], **fields) -> bytes:
    header, end = dict(fields), 0
    for name, data in tensors.items():
        start, end = end, end + len(data)
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


def make_model(model_dir: Path) -> Path:
    model_dir.mkdir()
    for name, tensors in OLD.items():
        (model_dir / name).write_bytes(safetensors_bytes(tensors, __metadata__={"format": "pt"}))
    weight_map = {tensor: name for name, tensors in OLD.items() for tensor in tensors}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model_dir


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return make_model(tmp_path / "model")


def sync(
    model_dir: Path, content=NEW, *, version: int = 1, disk: Disk = DISK, optimizer: bytes = b""
) -> None:
    """Writes every shard of `content`, and `optimizer` where there is one."""
    with begin(model_dir, disk=disk, lock_wait_s=0.1) as transaction:
        shards = read_shards(model_dir)
        digests = {
            name: digest(data) for shard in {**OLD, **content}.values() for name, data in shard.items()
        }
        for name, tensors in content.items():
            with transaction.create(name, shards[name].mode) as file:
                transaction.write(file, shards[name].header)
                for tensor in shards[name].tensors:
                    transaction.write(file, tensors[tensor.name])
        record = None
        if optimizer:
            name = f"optimizer-{transaction.serial}.safetensors"
            with transaction.create_state(name) as file:
                transaction.write(file, optimizer)
            record = checkpoint.FileRecord(name, len(optimizer), digest(optimizer))
        transaction.commit(
            weight_version=version, applied_seq=version, shards=shards, tensors=digests, optimizer=record
        )


def digest(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def contents(model_dir: Path) -> dict[str, bytes]:
    return {name: (model_dir / name).read_bytes() for name in NAMES}


def state_files(model_dir: Path) -> set[str]:
    return {path.name for path in (model_dir / ".apollo").iterdir()} - {"lock"}


OLD_OPTIMIZER, NEW_OPTIMIZER = b"moments of 1", b"moments of 2"


def make_synced(model_dir: Path) -> tuple[Path, dict[str, bytes], dict[str, bytes]]:
    """A model that was synced once without change of its shards; its bytes, and those of the next sync."""
    old = contents(make_model(model_dir))
    sync(model_dir, {}, version=1, optimizer=OLD_OPTIMIZER)
    return model_dir, old, {name: data.replace(b"old", b"new") for name, data in old.items()}


def assert_old_or_new(model_dir: Path, old: dict[str, bytes], new: dict[str, bytes]) -> int:
    """Exactly one of the two checkpoints, with its own record and optimizer; returns its version."""
    version = read_commit(model_dir).weight_version
    assert contents(model_dir) == {1: old, 2: new}[version]
    assert verify(model_dir) == []
    name = f"optimizer-{version}.safetensors"
    assert state_files(model_dir) == {"commit.json", name}
    expected = {1: OLD_OPTIMIZER, 2: NEW_OPTIMIZER}[version]
    assert (model_dir / ".apollo" / name).read_bytes() == expected
    assert recover(model_dir) == checkpoint.Recovery()
    return version


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
    assert recover(model_dir, disk=disk) == checkpoint.Recovery()
    assert not (model_dir / ".apollo").exists()
    assert disk.steps == []
    sync(model_dir)
    with DISK.lock(model_dir / ".apollo" / "lock", 0.0):
        assert recover(model_dir, disk=disk, lock_wait_s=0.0) == checkpoint.Recovery()
    assert disk.steps == [("sync_dir", ".apollo")]


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
    assert recover(model_dir) == checkpoint.Recovery()
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
    assert recover(harmless) == checkpoint.Recovery()
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


# --- what the shards hold ---


def test_the_index_gives_each_tensor_its_bytes(model_dir):
    index = shard_index(model_dir)
    assert index.keys() == {"a", "b", "c"}
    for name, tensors in OLD.items():
        data = (model_dir / name).read_bytes()
        for tensor, expected in tensors.items():
            where = index[tensor]
            assert (where.shard, where.dtype, where.shape) == (name, "U8", [len(expected)])
            assert data[where.start : where.end] == expected


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype="U8", shape=(4,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        (10).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{\xff}",
        (90_000).to_bytes(8, "little") + b"[" * 90_000,
        b"\x80\x04\x95" + b"pickle" * 10,
        header(a=entry()) + b"123",
        header(a=entry()) + b"12345",
        header(a=entry(shape=(5,))) + b"1234",
        header(a=entry(shape=(-2, -2))) + b"1234",
        header(a=entry(shape=(2**62, 2**62))) + b"1234",
        header(a=entry(offsets=(4, 0))) + b"1234",
        header(a=entry(offsets=(-4, 0))) + b"1234",
        header(a=entry(), b=entry(offsets=(2, 6))) + b"123456",
        header(a=entry(), b=entry(offsets=(6, 10))) + b"1234567890",
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        shard_index(tmp_path)


def test_an_unknown_dtype_and_empty_tensors_are_carried_along(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        header(a=entry("F4", (8,)), b=entry("F32", (0, 7), (4, 4)), c=entry("I64", (), (4, 12))) + bytes(12)
    )
    assert shard_index(tmp_path)["a"].size_bytes == 4
    assert shard_index(tmp_path)["b"].size_bytes == 0
    assert shard_index(tmp_path)["c"].shape == []


def test_a_directory_of_bin_files_needs_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"needs safetensors, found pytorch_model\.bin"):
        shard_index(tmp_path)


def test_an_index_that_contradicts_its_shards_is_refused(model_dir):
    path = model_dir / "model.safetensors.index.json"
    for weight_map, message in (
        ({"a": NAMES[1]}, "'a' is not in"),
        ({"z": NAMES[0]}, "'z' is not in"),
        ({"a": "../elsewhere.safetensors"}, "not a plain file name"),
        ({"a": "model-3.safetensors"}, "cannot read"),
        ([], "not an index"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            shard_index(model_dir)


def test_two_checkpoints_in_one_directory_are_refused(model_dir):
    (model_dir / "model.safetensors").write_bytes(safetensors_bytes({"a": b"1"}))
    with pytest.raises(CheckpointError, match="holds both"):
        shard_index(model_dir)


def test_a_tensor_in_two_shards_is_refused(model_dir):
    (model_dir / NAMES[1]).write_bytes(safetensors_bytes({"c": b"1", "a": b"2"}))
    with pytest.raises(CheckpointError, match="'a' is in"):
        shard_index(model_dir)


def test_the_header_is_kept_byte_for_byte(model_dir):
    assert (model_dir / NAMES[0]).read_bytes().startswith(header := read_shard(model_dir / NAMES[0]).header)
    sync(model_dir)
    assert read_shard(model_dir / NAMES[0]).header == header


def test_a_commit_is_current_until_a_shard_is_replaced_or_touched(model_dir):
    sync(model_dir)
    commit = read_commit(model_dir)
    assert checkpoint.is_current(model_dir, commit)
    recover(model_dir)
    assert checkpoint.is_current(model_dir, commit)
    path, info = model_dir / NAMES[0], (model_dir / NAMES[0]).stat()
    for replace in (
        lambda: path.write_bytes(path.read_bytes() + b"x"),
        lambda: os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1)),
        path.unlink,
    ):
        data = path.read_bytes()
        replace()
        assert not checkpoint.is_current(model_dir, commit)
        path.write_bytes(data)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        assert checkpoint.is_current(model_dir, commit)
