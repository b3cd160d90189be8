"""The operator's command after a commit: on a directory that stands still, and never in a sync's way."""

from __future__ import annotations

import re
import shutil
import sys
import time

import pytest
from apollo_worker.front.post_sync import PostSyncRunner
from synced_weights import Live, assert_same, make_model, state_files, stored

from apollo_ipc.checkpoint import read_commit, recover, verify
from apollo_ipc.config import Checkpoint
from apollo_ipc.wire.replies import SyncResult


def result_of(live: Live, version: int) -> SyncResult:
    return SyncResult(version, read_commit(live.model_dir).committed_at, 1, 1, 1, 10, 10, 0.1)


class Runner:
    def __init__(self, *command: str, timeout_s: float = 30.0):
        self.states = []
        config = Checkpoint(post_sync_command=list(command), post_sync_timeout_s=timeout_s)
        self.runner = PostSyncRunner(config, self.states.append)

    def run(self, live: Live, version: int):
        self.runner.note(result_of(live, version), str(live.model_dir))
        self.runner.wait(lambda: None)
        return self.states[-1]


@pytest.fixture
def live(tmp_path) -> Live:
    live = Live(make_model(tmp_path / "model"))
    live.train()
    live.sync()
    return live


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_rsync_copies_one_version_while_syncs_go_on(live, tmp_path):
    backup = tmp_path / "backup"
    # So slow that several syncs replace shards while it reads.
    # Shards of one size, and here of one second: rsync has to look at the nanoseconds.
    flags = ["-a", "--delete", "--modify-window=-1", "--whole-file", "--bwlimit=10"]
    runner = Runner("rsync", *flags, "{snapshot}/", f"{backup}/")
    runner.runner.note(result_of(live, 1), str(live.model_dir))
    num_syncs = 0
    deadline = time.monotonic() + 20
    while (not runner.states or runner.states[-1].ended_at is None) and time.monotonic() < deadline:
        live.train()
        live.sync("delta" if num_syncs % 3 else "full")
        num_syncs += 1
    runner.runner.wait(lambda: None)
    state = runner.states[-1]
    assert state.error is None
    assert num_syncs > 2
    assert verify(backup) == []
    recover(backup)
    assert_same(stored(backup), live.versions[state.weight_version])
    # And once more onto the same backup, as every day.
    assert runner.run(live, len(live.versions) - 1).error is None
    assert verify(backup) == []
    assert not any(name.startswith("snapshot") for name in state_files(live.model_dir))


def test_a_command_gets_the_snapshot_and_the_version(live, tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, sys; open(sys.argv[1], 'w').write("
        "' '.join([sys.argv[2], os.environ['APOLLO_WEIGHT_VERSION'], os.environ['APOLLO_MODEL_DIR'], "
        "str(os.getcwd() == os.environ['APOLLO_SNAPSHOT']), os.environ['APOLLO_SYNC_KIND']]))"
    )
    state = Runner(sys.executable, "-c", code, str(out), "v{weight_version}").run(live, 1)
    assert state.error is None
    assert out.read_text() == f"v1 1 {live.model_dir} True full"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("false",), "false ended with status 1: it said nothing"),
        (("sh", "-c", "echo no route to host >&2; exit 12"), "sh ended with status 12: no route to host"),
        (("/no/such/program",), "cannot run /no/such/program: No such file or directory"),
        (("sleep", "100"), r"sleep took more than 0.3 s \(checkpoint.post_sync_timeout_s\)"),
    ],
)
def test_a_command_that_fails_is_told_of_and_blocks_nothing(live, command, message):
    runner = Runner(*command, timeout_s=0.3)
    state = runner.run(live, 1)
    assert re.fullmatch(message, state.error)
    assert state.ended_at >= state.started_at
    assert state_files(live.model_dir) == {"commit.json", "optimizer-1.safetensors", "undo-0-1"}
    live.train()
    live.sync()
    assert runner.run(live, 2).weight_version == 2


def test_commits_that_come_while_it_runs_are_one_more_run(live, tmp_path):
    log = tmp_path / "log"
    runner = Runner("sh", "-c", f"echo {{weight_version}} >> {log}; sleep 0.5")
    runner.runner.note(result_of(live, 1), str(live.model_dir))
    while not log.exists():
        time.sleep(0.01)
    for version in (2, 3, 4):
        live.train()
        live.sync()
        result = result_of(live, version)
        for _ in range(3):  # the trainer says the same again and again
            runner.runner.note(result, str(live.model_dir))
    runner.runner.wait(lambda: None)
    assert log.read_text().split() == ["1", "4"]


def test_without_a_command_nothing_runs(live):
    runner = Runner()
    runner.runner.note(result_of(live, 1), str(live.model_dir))
    runner.runner.wait(lambda: None)
    assert runner.states == []


def test_an_error_of_the_system_is_told_and_the_next_commit_runs_the_command(live, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise FileNotFoundError(2, "No usable temporary directory found")

    runner = Runner("touch", str(tmp_path / "ran"))
    with monkeypatch.context() as patch:
        patch.setattr("apollo_worker.front.post_sync.tempfile.TemporaryFile", full)
        assert "No usable temporary directory" in runner.run(live, 1).error
    assert not (tmp_path / "ran").exists()
    live.train()
    live.sync()
    assert runner.run(live, 2).error is None
    assert (tmp_path / "ran").exists()


def test_a_thread_that_ends_by_a_bug_holds_nobody_up_and_is_replaced(live, tmp_path, monkeypatch):
    runner, reports = Runner("touch", str(tmp_path / "ran")), []
    monkeypatch.setattr("threading.excepthook", reports.append)
    monkeypatch.setattr(runner.runner, "_on_change", lambda state: 1 // 0)
    runner.runner.note(result_of(live, 1), str(live.model_dir))
    runner.runner.wait(lambda: None)
    assert [report.exc_type for report in reports] == [ZeroDivisionError]
    monkeypatch.setattr(runner.runner, "_on_change", runner.states.append)
    live.train()
    live.sync()
    assert runner.run(live, 2).error is None
