"""Delta commits, folding, older versions: live tensors into a small model directory."""

from __future__ import annotations

import os
import threading

import msgspec
import numpy as np
import pytest
import torch
from apollo_worker.sync.optimizer_file import read_optimizer
from apollo_worker.sync.writer import CheckpointWriter
from safetensors.torch import load_file, save_file
from synced_weights import SHARDS, Live, assert_same, state_files, stored

from apollo_ipc.checkpoint import history as versions
from apollo_ipc.checkpoint import (
    loading,
    read_commit,
    recover,
    restore_version,
    verify,
)
from apollo_ipc.checkpoint.disk import Disk, ThrottledDisk
from apollo_ipc.errors import CheckpointError, UserError


def test_a_delta_leaves_the_shards_alone_and_a_recovery_works_it_in(model_dir):
    live = Live(model_dir)
    inodes = {name: (model_dir / name).stat().st_ino for name in SHARDS}
    live.train("a")
    version = live.sync("delta")
    assert {name: (model_dir / name).stat().st_ino for name in SHARDS} == inodes
    assert_same(stored(model_dir), live.versions[0])
    assert_same(live.read(version), live.versions[version])
    assert verify(model_dir) == []
    assert recover(model_dir).folded_version == version
    assert_same(stored(model_dir), live.versions[version])
    assert (model_dir / SHARDS[1]).stat().st_ino == inodes[SHARDS[1]], "an untouched shard was written"
    assert not recover(model_dir)
    live.assert_all_readable(0, version)


def test_deltas_are_cumulative_and_each_stays_restorable(model_dir):
    live = Live(model_dir)
    for names in (["a"], ["b"], ["a", "c"]):
        live.train(*names)
        live.sync("delta")
    live.assert_all_readable(0, 1, 2, 3)
    recover(model_dir)
    assert_same(stored(model_dir), live.versions[3])
    live.assert_all_readable(0, 1, 2, 3)


def test_versions_stay_readable_through_full_syncs_deltas_and_folds_in_any_order(model_dir):
    live = Live(model_dir, num_kept=20)
    for kind in ("full", "delta", "delta", "full", "full", "delta", "fold", "delta", "full", "delta"):
        if kind == "fold":
            recover(model_dir)
        else:
            live.train(*(["a", "b"] if len(live.versions) % 2 else []))
            live.sync(kind)
        live.assert_all_readable(*live.versions)


def test_only_so_many_versions_are_kept_and_their_files_go(model_dir):
    live = Live(model_dir, num_kept=2)
    for kind in ("full", "delta", "delta", "full", "delta", "delta", "delta", "full"):
        live.train()
        live.sync(kind)
    live.assert_all_readable(6, 7, 8)
    assert state_files(model_dir) == {
        "commit.json",
        *(f"optimizer-{i}.safetensors" for i in (6, 7, 8)),
        *(f"delta-{i}" for i in (6, 7)),
        "undo-4-8",
    }


def test_without_history_nothing_is_kept(model_dir):
    live = Live(model_dir, num_kept=0)
    for kind in ("full", "delta", "full"):
        live.train()
        live.sync(kind)
    live.assert_all_readable(3)
    assert state_files(model_dir) == {"commit.json", "optimizer-3.safetensors"}


def test_nothing_trained_makes_no_new_version(model_dir):
    live = Live(model_dir)
    live.train()
    live.sync()
    before = read_commit(model_dir)
    live.writer.sync(weight_version=1, applied_seq=10)
    after = read_commit(model_dir)
    assert [v.weight_version for v in after.history] == [v.weight_version for v in before.history] == [0]
    assert after.serial == before.serial + 1


@pytest.mark.parametrize("target", [0, 1, 2, 3])
def test_a_restored_version_is_a_new_one_and_the_step_back_can_be_undone(model_dir, target):
    live = Live(model_dir)
    for kind in ("full", "delta", "full"):
        live.train()
        live.sync(kind)
    commit = restore_version(model_dir, target, num_kept=4)
    assert commit.weight_version == 4
    assert commit.extra["restored_from"] == target
    assert_same(stored(model_dir), live.versions[target])
    saved = read_optimizer(model_dir, commit.optimizer)
    assert (saved[1]["version"] if saved else 0) == target
    restore_version(model_dir, 3, num_kept=6)
    assert_same(stored(model_dir), live.versions[3])
    assert verify(model_dir) == []


def test_a_version_that_is_not_kept_is_refused_with_those_that_are(model_dir):
    live = Live(model_dir, num_kept=1)
    for _ in range(3):
        live.train()
        live.sync()
    with pytest.raises(UserError, match="version 1 is not kept; there are: 2, 3"):
        restore_version(model_dir, 1)


def test_a_damaged_older_version_is_not_restored_and_the_present_one_stays(model_dir):
    live = Live(model_dir)
    live.train()
    live.sync()
    path = model_dir / ".apollo" / "undo-0-1"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)
    assert [p.message for p in verify(model_dir)] == ["missing or damaged differences of older versions"]
    with pytest.raises(CheckpointError):
        restore_version(model_dir, 0)
    assert_same(stored(model_dir), live.versions[1])
    assert not [name for name in state_files(model_dir) if name.startswith("pending")]


def test_a_delta_is_refused_on_the_wrong_base(model_dir):
    live = Live(model_dir)
    live.train()
    live.sync("delta")
    damaged = load_file(model_dir / SHARDS[0])
    damaged["a"][3] += 1
    save_file(damaged, model_dir / SHARDS[0], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="'a' is neither what the last full sync wrote nor"):
        recover(model_dir)
    with pytest.raises(CheckpointError), loading(model_dir, lock_wait_s=0.1):
        pass


def test_a_fold_that_was_cut_off_goes_on_where_it_was(model_dir, tmp_path):
    live = Live(model_dir)
    live.train()
    live.sync("delta")

    class Stops(Disk):
        def rename(self, source, target):
            super().rename(source, target)
            raise KeyboardInterrupt  # after the first shard

    with pytest.raises(KeyboardInterrupt):
        recover(model_dir, disk=Stops())
    names = [problem.message for problem in verify(model_dir)]
    assert any("run recover" in name for name in names)
    assert recover(model_dir).folded_version == 1
    assert_same(stored(model_dir), live.versions[1])
    live.assert_all_readable(0, 1)


def test_a_damaged_base_gives_no_delta(model_dir):
    live = Live(model_dir)
    live.train()
    live.sync()
    info = (model_dir / SHARDS[0]).stat()
    data = bytearray((model_dir / SHARDS[0]).read_bytes())
    data[-5] ^= 1
    (model_dir / SHARDS[0]).write_bytes(data)
    os.utime(model_dir / SHARDS[0], ns=(info.st_atime_ns, info.st_mtime_ns))
    live.train()
    with pytest.raises(CheckpointError, match="damaged on disk"):
        live.writer.sync("delta", weight_version=2, applied_seq=1)
    assert read_commit(model_dir).weight_version == 1


def test_training_goes_on_while_a_sync_is_being_written(model_dir):
    """What was copied out is what is committed, whatever happens to the live weights afterwards."""
    may_write = threading.Event()

    class Slow(Disk):
        def write(self, file, data):
            assert may_write.wait(10)
            super().write(file, data)

    live = Live(model_dir, disk=Slow())
    live.train("a")  # of one shard: so much may be copied out before anything is written
    expected = {**live.versions[0], **{name: t.clone() for name, t in live.tensors.items()}}
    running = live.writer.start(weight_version=1, applied_seq=1)
    assert not running.is_committed()
    live.train()
    may_write.set()
    assert running.committed.result(10).training_waited_s < 10
    live.writer.wait()
    assert_same(stored(model_dir), expected)
    assert verify(model_dir) == []


def test_an_error_of_the_writing_thread_reaches_who_waits(model_dir):
    class Full(Disk):
        def sync(self, file):
            raise CheckpointError("cannot flush: no space")

    live = Live(model_dir, disk=Full())
    live.train("a")
    running = live.writer.start(weight_version=1, applied_seq=1)
    with pytest.raises(CheckpointError, match="no space"):
        running.committed.result(10)
    live.writer.wait()
    assert read_commit(model_dir) is None
    assert state_files(model_dir) == set()


def test_copying_out_waits_for_the_writer_beyond_one_shard(model_dir):
    from apollo_worker.sync.copy_out import SLOT_BYTES, Arenas, CopyOut

    copies, seen = CopyOut(2 * SLOT_BYTES, Arenas()), []

    def block() -> torch.Tensor:
        return torch.zeros(SLOT_BYTES, dtype=torch.uint8)

    def write() -> None:
        seen.extend(block.nbytes for name in "xyz" for block in copies.take(name))

    for name in "xy":
        copies.put(name, iter([block()]))
    putting = threading.Thread(target=copies.put, args=("z", iter([block()])), daemon=True)
    putting.start()
    putting.join(0.2)
    assert putting.is_alive(), "three slots were taken where two are the limit"
    write()
    putting.join(5)
    assert seen == [SLOT_BYTES] * 3


def test_a_weight_beyond_the_limit_refuses_the_sync(model_dir):
    live = Live(model_dir)
    live.tensors["b"][0, 0] = 500.0
    writer = CheckpointWriter(model_dir, live.tensors, max_abs_limit=100.0)
    with pytest.raises(CheckpointError, match=r"'b' holds a weight of 500, beyond checkpoint.max_abs_weight"):
        writer.sync(weight_version=1, applied_seq=0)
    assert read_commit(model_dir) is None
    result = live.writer.sync(weight_version=1, applied_seq=0)
    assert (result.max_abs_weight, result.max_abs_name) == (500.0, "b")


def test_versions_can_be_compared(model_dir):
    live = Live(model_dir)
    live.train("a")
    live.sync()
    commit = read_commit(model_dir)
    found = list(versions.diff(model_dir, commit, versions.find(commit, 0), versions.find(commit, 1)))
    assert [one.name for one in found] == ["a"]
    assert (found[0].num_elements, found[0].num_changed, found[0].max_steps) == (1200, 600, 1)
    before, after = live.versions[0]["a"].double(), live.versions[1]["a"].double()
    expected = ((after - before).norm() / before.norm()).item()
    assert np.isclose(found[0].relative_norm, expected, rtol=1e-9)


def test_a_file_system_without_links_keeps_no_history_and_syncs_all_the_same(model_dir):
    class NoLinks(Disk):
        def link(self, source, target):
            error = CheckpointError("cannot link")
            raise error from OSError(95, "not supported")

    live = Live(model_dir, disk=NoLinks())
    for _ in range(2):
        live.train()
        live.sync()
    live.assert_all_readable(2)


def test_shards_that_someone_replaced_have_no_older_versions(model_dir):
    live = Live(model_dir)
    live.train()
    live.sync()
    other = load_file(model_dir / SHARDS[1])
    other["c"] += 1
    save_file(other, model_dir / SHARDS[1], metadata={"format": "pt"})
    live.train()
    live.sync()
    live.assert_all_readable(2)


def test_a_throttled_disk_writes_no_faster_than_it_may(tmp_path):
    import time

    disk = ThrottledDisk(bytes_per_s=1_000_000)
    file = disk.create(tmp_path / "x")
    started = time.monotonic()
    for _ in range(11):
        disk.write(file, bytes(20_000))
    disk.close(file)
    assert time.monotonic() - started >= 0.2
    assert (tmp_path / "x").stat().st_size == 220_000


def test_a_record_of_the_first_format_is_read(model_dir):
    live = Live(model_dir)
    live.train()
    live.sync()
    path = model_dir / ".apollo" / "commit.json"
    record = msgspec.json.decode(path.read_bytes())
    for name in ("base", "delta", "history", "undos", "seal"):
        del record[name]
    record["format"] = 1
    path.write_bytes(msgspec.json.encode(record))
    live.train()
    live.sync("delta")
    live.train()
    live.sync()
    live.assert_all_readable(1, 2, 3)
