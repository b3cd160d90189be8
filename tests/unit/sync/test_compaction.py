"""Older shards are kept whole until they are compacted; a compaction never stands in a sync's way."""

from __future__ import annotations

from synced_weights import Live, state_files

from apollo_ipc.checkpoint import (
    compact,
)
from apollo_ipc.checkpoint.disk import Disk


def test_older_shards_are_kept_whole_until_they_are_compacted(model_dir, monkeypatch):
    monkeypatch.setattr("apollo_worker.sync.sync_task.compact", lambda *args, **kwargs: 0)
    live = Live(model_dir)
    for _ in range(3):
        live.train()
        live.sync()
    assert {"old-0", "old-1", "old-2"} <= state_files(model_dir)
    live.assert_all_readable(0, 1, 2, 3)
    assert compact(model_dir) > 0
    assert {"undo-0-1", "undo-1-2", "undo-2-3"} <= state_files(model_dir)
    assert not [name for name in state_files(model_dir) if name.startswith("old")]
    live.assert_all_readable(0, 1, 2, 3)
    assert compact(model_dir) == 0


def test_a_compaction_that_is_overtaken_changes_nothing(model_dir, monkeypatch):
    monkeypatch.setattr("apollo_worker.sync.sync_task.compact", lambda *args, **kwargs: 0)
    live = Live(model_dir)
    live.train()
    live.sync()

    class Overtaken(Disk):
        def sync(self, file):
            super().sync(file)
            if file.path.name.startswith("undo"):
                live.train()
                live.sync()  # its begin throws the unfinished file away

    assert compact(model_dir, disk=Overtaken()) == 0
    live.assert_all_readable(0, 1, 2)
    compact(model_dir)
    live.assert_all_readable(0, 1, 2)


def test_a_compaction_can_be_cancelled(model_dir, monkeypatch):
    monkeypatch.setattr("apollo_worker.sync.sync_task.compact", lambda *args, **kwargs: 0)
    live = Live(model_dir)
    live.train()
    live.sync()
    assert compact(model_dir, is_cancelled=lambda: True) == 0
    assert "old-0" in state_files(model_dir)
    live.assert_all_readable(0, 1)
