"""Syncs of live tensors that are refused, fail, stop or are killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from apollo_worker.sync.optimizer_file import read_optimizer
from apollo_worker.sync.writer import CheckpointWriter
from safetensors import safe_open
from safetensors.torch import save_file
from saved_model import (
    EMBED,
    LAST_MLP,
    NORM,
    assert_loads_as,
    bits,
    shard_bytes,
    shard_of,
    state_files,
    stored,
)
from stepped_disk import Crash, SteppedDisk

from apollo_ipc.checkpoint import read_commit, recover, verify
from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.errors import CheckpointError

# --- refusals ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_tensor_refuses_the_whole_sync(multi, bad):
    old = shard_bytes(multi)
    live = stored(multi)
    for tensor in live.values():
        tensor += 1
    live[NORM].view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds non-finite"):
        CheckpointWriter(multi, live).sync(weight_version=1, applied_seq=0)
    assert shard_bytes(multi) == old
    assert read_commit(multi) is None
    assert state_files(multi) == set()


def test_a_value_that_overflows_the_shards_dtype_is_refused(tmp_path):
    save_file({"w": torch.ones(4, dtype=torch.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'w' holds non-finite values as F16"):
        CheckpointWriter(tmp_path, {"w": torch.full((4,), 1e6)}).sync(weight_version=1, applied_seq=0)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("function", ["write", "fdatasync"])
def test_a_failing_disk_leaves_the_old_and_the_next_sync_succeeds(multi, monkeypatch, error, function):
    old, live = shard_bytes(multi), stored(multi)
    for tensor in live.values():
        tensor += 1
    writer = CheckpointWriter(multi, live)
    real, calls = getattr(os, function), []

    def fail(fd, *args):
        if "pending-1/model-00002" not in os.readlink(f"/proc/self/fd/{fd}"):
            return real(fd, *args)
        calls.append(fd)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError, match=os.strerror(error)):
        writer.sync(weight_version=1, applied_seq=0)
    monkeypatch.undo()
    assert len(calls) == 1
    assert shard_bytes(multi) == old
    assert state_files(multi) == set()
    writer.sync(weight_version=1, applied_seq=0)
    assert_loads_as(multi, live)


def test_space_is_checked_before_anything_is_written(multi, monkeypatch):
    live = stored(multi)
    live[LAST_MLP] += 1
    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: 65 * 1024 * 1024)
    CheckpointWriter(multi, live).sync(weight_version=1, applied_seq=0)
    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: 64 * 1024 * 1024)
    CheckpointWriter(multi, live).sync(weight_version=2, applied_seq=0)  # nothing changed: needs nothing
    live[LAST_MLP] += 1
    needed = shard_of(multi, LAST_MLP).stat().st_size
    with pytest.raises(CheckpointError, match=f"needs {needed:,}"):
        CheckpointWriter(multi, live).sync(weight_version=3, applied_seq=0)


# --- crashes ---


OLD_STATE = ({"m": torch.zeros(3)}, {"version": 1})
NEW_STATE = ({"m": torch.ones(3)}, {"version": 2})


def test_a_sync_that_stops_at_any_operation_leaves_the_old_or_the_new_weights(multi, tmp_path):
    live = stored(multi)
    CheckpointWriter(multi, live).sync(weight_version=1, applied_seq=1, optimizer=OLD_STATE)
    old = shard_bytes(multi)
    live[LAST_MLP] += 1
    live[EMBED] += 1

    def sync_copy(name: str, disk: SteppedDisk) -> Path:
        model_dir = shutil.copytree(multi, tmp_path / name)
        try:
            writer = CheckpointWriter(model_dir, live, disk=disk)
            writer.sync(weight_version=2, applied_seq=2, optimizer=NEW_STATE)
        except Crash:
            recover(model_dir)
        return model_dir

    complete = SteppedDisk()
    new = shard_bytes(sync_copy("complete", complete))
    num_changed = sum(old[name] != new[name] for name in old)
    assert num_changed == 2
    versions = []
    for stop_at in range(len(complete.steps)):
        model_dir = sync_copy(f"stop-{stop_at}", SteppedDisk(stop_at))
        commit = read_commit(model_dir)
        versions.append(commit.weight_version)
        assert shard_bytes(model_dir) == {1: old, 2: new}[commit.weight_version]
        assert commit.applied_seq == commit.weight_version
        assert read_optimizer(model_dir, commit.optimizer)[1] == {"version": commit.weight_version}
        assert verify(model_dir) == []
        assert state_files(model_dir) == {"commit.json", commit.optimizer.name}
        shutil.rmtree(model_dir)
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}


SYNC_FOREVER = """
import sys
from pathlib import Path
import torch
from apollo_worker.sync.writer import CheckpointWriter
from safetensors.torch import load_file
model_dir = Path(sys.argv[1])
live = {n: t for p in model_dir.glob("*.safetensors") for n, t in load_file(p).items()}
writer = CheckpointWriter(model_dir, live)
for version in range(1, 100_000):
    for tensor in live.values():
        tensor.fill_(version % 256)
    writer.sync(weight_version=version, applied_seq=version, optimizer=({"v": torch.tensor([version])}, {}))
    print(version, flush=True)
"""


def test_a_killed_sync_leaves_the_old_or_the_new_checkpoint(multi):
    command = [sys.executable, "-c", SYNC_FOREVER, str(multi)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert lines == ["1\n", "2\n", "3\n"]
    recover(multi)
    commit = read_commit(multi)
    assert verify(multi) == []
    assert {t.float().unique().item() for t in stored(multi).values()} == {commit.weight_version}
    assert read_optimizer(multi, commit.optimizer)[0]["v"].item() == commit.weight_version


def test_a_reader_that_has_a_shard_open_keeps_the_weights_it_began_with(single):
    live = stored(single)
    old = {name: tensor.clone() for name, tensor in live.items()}
    with safe_open(single / "model.safetensors", framework="pt") as reader:
        live[EMBED] += 1
        live[LAST_MLP] += 1
        CheckpointWriter(single, live).sync(weight_version=1, applied_seq=0)
        assert all(bits(reader.get_tensor(name)) == bits(tensor) for name, tensor in old.items())
