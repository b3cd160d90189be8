"""A pinned version stays restorable however many syncs follow, and costs one set of differences."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from synced_weights import SHARDS, Live, assert_same, state_files, stored
from typer.testing import CliRunner

from apollo_ipc.checkpoint import (
    begin,
    compact,
    pin_version,
    read_commit,
    recover,
    restore_version,
    snapshot,
    verify,
)
from apollo_ipc.checkpoint import history as versions
from apollo_ipc.cli.main import app
from apollo_ipc.errors import CheckpointError, UserError

KINDS = ("full", "delta", "delta", "full", "fold", "delta", "full", "full", "delta", "delta", "full")


def train_and_sync(live: Live, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        if kind == "fold":
            recover(live.model_dir)
        else:
            live.train(*(["a", "b"] if len(live.versions) % 2 else []))
            live.sync(kind)


def restorable(model_dir: Path) -> list[int]:
    return [version.weight_version for version in versions.versions(read_commit(model_dir))]


@pytest.mark.parametrize("pinned", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("num_kept", [0, 1, 3])
def test_a_pinned_version_is_read_and_restored_after_any_number_of_syncs(model_dir, pinned, num_kept):
    live = Live(model_dir, num_kept=max(num_kept, 4))
    train_and_sync(live, KINDS[:4])
    pin_version(model_dir, pinned)
    assert_same(live.read(pinned), live.versions[pinned])
    live = live.restarted(num_kept=num_kept)
    for at in range(4, len(KINDS)):
        train_and_sync(live, KINDS[at : at + 1])
        last = len(live.versions) - 1
        newest = [version for version in range(last - num_kept, last + 1) if version != pinned]
        if KINDS[at] != "fold":
            assert restorable(model_dir) == sorted({pinned, *newest})
        assert_same(live.read(pinned), live.versions[pinned])
        assert verify(model_dir) == []
    restored = restore_version(model_dir, pinned)
    assert_same(stored(model_dir), live.versions[pinned])
    assert (restored.optimizer is None) == (pinned == 0)


def test_the_way_back_to_an_old_pin_is_one_file_however_many_full_syncs_lie_between(model_dir):
    live = Live(model_dir, num_kept=2)
    train_and_sync(live, ("full",))
    pin_version(model_dir, 1)
    sizes = []
    for _ in range(8):
        train_and_sync(live, ("full",))
        sizes.append(versions.size_bytes(model_dir, read_commit(model_dir)))
    bases = [(undo.base, undo.newer) for undo in read_commit(model_dir).undos]
    assert bases == [(1, 7), (7, 8), (8, 9)]
    assert {"undo-1-7", "undo-7-8", "undo-8-9"} <= state_files(model_dir)
    live.assert_all_readable(1, 7, 8, 9)
    assert sizes[-1] < 1.5 * sizes[3], "what a pin costs does not grow with each sync"


def test_an_unpinned_version_goes_with_the_next_sync_and_its_files_too(model_dir):
    live = Live(model_dir, num_kept=1)
    train_and_sync(live, ("full", "full"))
    assert pin_version(model_dir, 1) is None
    train_and_sync(live, ("full", "full"))
    assert restorable(model_dir) == [1, 3, 4]
    assert pin_version(model_dir, None) == 1
    assert restorable(model_dir) == [1, 3, 4], "until the next sync"
    train_and_sync(live, ("full",))
    assert restorable(model_dir) == [4, 5]
    assert state_files(model_dir) == {
        *("commit.json", "optimizer-4.safetensors", "optimizer-5.safetensors", "undo-4-5"),
    }


def test_the_pin_moves_and_only_one_version_has_it(model_dir):
    live = Live(model_dir, num_kept=1)
    train_and_sync(live, ("full",))
    pin_version(model_dir, 1)
    train_and_sync(live, ("delta", "full"))
    assert pin_version(model_dir, 3) == 1
    assert pin_version(model_dir, 3) == 3
    train_and_sync(live, ("full", "full"))
    assert restorable(model_dir) == [3, 4, 5]


def test_restoring_the_pinned_version_gives_the_new_one_the_pin(model_dir):
    live = Live(model_dir, num_kept=2)
    train_and_sync(live, ("full", "full"))
    pin_version(model_dir, 1)
    assert restore_version(model_dir, 2).pinned == 1
    assert restore_version(model_dir, 1).pinned == 4
    assert_same(stored(model_dir), live.versions[1])


def test_a_sync_of_nothing_new_keeps_the_pin(model_dir):
    live = Live(model_dir, num_kept=1)
    train_and_sync(live, ("full",))
    pin_version(model_dir, 1)
    for _ in range(3):
        live.writer.sync(weight_version=1, applied_seq=10)
    train_and_sync(live, ("full", "full", "full"))
    assert restorable(model_dir) == [1, 3, 4]
    assert_same(live.read(1), live.versions[1])


def test_replaced_shards_end_the_pin(model_dir):
    live = Live(model_dir)
    train_and_sync(live, ("full",))
    pin_version(model_dir, 1)
    save_file({"a": torch.zeros(40, 30).bfloat16(), "still": torch.zeros(8)}, model_dir / SHARDS[0])
    train_and_sync(live, ("full",))
    commit = read_commit(model_dir)
    assert (commit.pinned, restorable(model_dir)) == (None, [2])


def test_a_copy_has_no_pin(model_dir, tmp_path):
    live = Live(model_dir)
    train_and_sync(live, ("full", "full"))
    pin_version(model_dir, 1)
    with snapshot(model_dir) as taken:
        assert read_commit(taken.path).pinned is None


def test_a_merging_that_is_overtaken_changes_nothing(model_dir, monkeypatch):
    live = Live(model_dir, num_kept=1)
    train_and_sync(live, ("full",))
    pin_version(model_dir, 1)
    monkeypatch.setattr("apollo_worker.sync.sync_task.compact", lambda *args, **kwargs: 0)
    train_and_sync(live, ("full", "full", "full"))
    seen = []

    def overtake() -> bool:
        seen.append([undo.kept for undo in read_commit(model_dir).undos])
        if not any(seen[-1]) and len(live.versions) == 5:  # all are differences: two are being made one
            train_and_sync(live, ("full",))
        return False

    compact(model_dir, is_cancelled=overtake)
    assert len(seen[-1]) == 3, (
        "one after the other was compacted, and nothing after the one that was overtaken"
    )
    live.assert_all_readable(1, 4, 5)
    compact(model_dir)
    live.assert_all_readable(1, 4, 5)
    assert [(undo.base, undo.newer) for undo in read_commit(model_dir).undos] == [(1, 4), (4, 5)]


def test_a_record_without_a_pin_is_read_as_one(model_dir):
    live = Live(model_dir)
    train_and_sync(live, ("full",))
    path = model_dir / ".apollo" / "commit.json"
    record = json.loads(path.read_text())
    del record["pinned"], record["seal"]
    path.write_text(json.dumps(record))
    assert read_commit(model_dir).pinned is None


def test_what_is_not_there_is_not_pinned(model_dir):
    with pytest.raises(UserError, match="nothing was synced here yet"):
        pin_version(model_dir, 1)
    live = Live(model_dir, num_kept=1)
    train_and_sync(live, ("full", "full", "full"))
    with pytest.raises(UserError, match="version 1 is not kept; there are: 2, 3"):
        pin_version(model_dir, 1)
    assert read_commit(model_dir).pinned is None


def test_a_pin_waits_for_a_sync_that_is_being_written(model_dir):
    live = Live(model_dir)
    train_and_sync(live, ("full",))
    with begin(model_dir), pytest.raises(CheckpointError, match="lock"):
        pin_version(model_dir, 1, lock_wait_s=0.05)
    has_begun, found = threading.Event(), []
    with begin(model_dir):
        thread = threading.Thread(target=lambda: (has_begun.set(), found.append(pin_version(model_dir, 1))))
        thread.start()
        assert has_begun.wait(5)
        assert not found
    thread.join(10)
    assert found == [None]
    assert read_commit(model_dir).pinned == 1


def test_the_command_pins_shows_and_unpins(model_dir):
    live = Live(model_dir, num_kept=1)
    train_and_sync(live, ("full", "full"))

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["checkpoint", *arguments])
        return f"{done.exit_code} {done.output or done.exception}"

    directory = ("--model-dir", str(model_dir))
    assert run("pin", "1", *directory) == f"0 {model_dir}: version 1 is pinned\n"
    assert "pinned" in run("history", str(model_dir)).splitlines()[1]
    rows = json.loads(run("history", str(model_dir), "--json").removeprefix("0 "))["versions"]
    assert [row["is_pinned"] for row in rows] == [True, False]
    assert run("pin", "2", *directory) == f"0 {model_dir}: version 2 is pinned (before: 1)\n"
    assert json.loads(run("pin", "--none", *directory, "--json").removeprefix("0 ")) == {
        **{"model_dir": str(model_dir), "pinned": None, "pinned_before": 2},
    }
    for wrong in (("pin", *directory), ("pin", "1", "--none", *directory)):
        assert "name either the VERSION to be pinned or --none" in run(*wrong)
    assert "version 9 is not kept" in run("pin", "9", *directory)


def test_pins_are_carried_by_every_change_of_the_record(model_dir):
    """A commit that forgot the pin would lose the version at the next sync: so say all that write records."""
    live = Live(model_dir, num_kept=2)
    train_and_sync(live, ("full", "full"))
    pin_version(model_dir, 1)
    for change in (
        lambda: train_and_sync(live, ("full",)),
        lambda: train_and_sync(live, ("delta",)),
        lambda: recover(model_dir),
        lambda: compact(model_dir),
        lambda: restore_version(model_dir, 2, num_kept=2),
    ):
        change()
        assert read_commit(model_dir).pinned == 1
    assert msgspec.json.decode((model_dir / ".apollo" / "commit.json").read_bytes())["pinned"] == 1
