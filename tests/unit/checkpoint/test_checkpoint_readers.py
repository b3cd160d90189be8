"""Who reads a model directory while syncs go on: vLLM loading it, a snapshot, a copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from apollo_worker.sync.optimizer_file import read_optimizer
from synced_weights import SHARDS, Live, assert_same, make_model, state_files, stored

from apollo_ipc.checkpoint import (
    check_shards,
    forget,
    loading,
    read_commit,
    recover,
    snapshot,
    verify,
)
from apollo_ipc.errors import CheckpointError


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return make_model(tmp_path / "model")


def test_a_copy_of_a_directory_folds_though_its_times_are_new(model_dir, tmp_path):
    live = Live(model_dir)
    live.train()
    live.sync("delta")
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy, copy_function=shutil.copyfile)
    assert recover(copy).folded_version == 1
    assert_same(stored(copy), live.versions[1])


def test_shards_are_loaded_only_as_they_were_committed(model_dir):
    check_shards(model_dir)  # never synced: taken as they are
    live = Live(model_dir)
    live.train()
    live.sync()
    check_shards(model_dir)
    with (model_dir / SHARDS[1]).open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    with pytest.raises(CheckpointError, match=r"b in model-00002.*checkpoint forget"):
        check_shards(model_dir)
    assert forget(model_dir)
    check_shards(model_dir)
    assert state_files(model_dir) == set()
    assert not forget(model_dir)


def test_no_sync_begins_while_the_shards_are_being_loaded(model_dir):
    live = Live(model_dir)
    live.train()
    live.sync()
    live.train()
    with loading(model_dir), pytest.raises(CheckpointError, match="another process is using"):
        live.sync()
    live.sync()
    live.assert_all_readable(0, 1, 2)


def test_loading_a_directory_that_nobody_can_write_to_needs_no_lock(tmp_path):
    model_dir = make_model(tmp_path / "model")
    with loading(model_dir) as recovery:
        assert not recovery
    assert not (model_dir / ".apollo").exists()


def test_a_snapshot_stands_still_while_syncs_go_on_and_is_a_checkpoint_itself(model_dir, tmp_path):
    live = Live(model_dir)
    live.train()
    live.sync()
    live.train()
    live.sync("delta")
    with snapshot(model_dir) as taken:
        live.train()
        live.sync()
        live.train()
        live.sync("delta")
        copy = shutil.copytree(taken.path, tmp_path / "copy")
        assert "pending" not in " ".join(state_files(model_dir))
        assert taken.path.is_dir(), "a sync has removed a snapshot that is held"
    assert not taken.path.exists()
    assert verify(copy) == []
    assert recover(copy).folded_version == 2
    assert_same(stored(copy), live.versions[2])
    assert (copy / "original" / "params.json").read_text() == "{}"
    assert read_optimizer(copy, read_commit(copy).optimizer)[1] == {"version": 2}
    live.assert_all_readable(0, 1, 2, 3, 4)


def test_a_snapshot_whose_maker_was_killed_is_removed_by_the_next_sync(model_dir):
    live = Live(model_dir)
    live.train()
    live.sync()
    code = (
        "import os, signal, sys; from pathlib import Path; from apollo_ipc.checkpoint import snapshot\n"
        "with snapshot(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(model_dir)], timeout=60)
    assert any(name.startswith("snapshot") for name in state_files(model_dir))
    live.train()
    live.sync()
    assert not any(name.startswith("snapshot") for name in state_files(model_dir))
