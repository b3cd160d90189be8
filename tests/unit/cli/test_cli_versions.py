"""`apollo-ipc checkpoint history | diff | restore | forget | snapshot`, as a user meets them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from synced_weights import Live, assert_same, make_model, stored

from apollo_ipc.checkpoint import verify
from apollo_ipc.manifest import Manifest, start_ticks, write_manifest


@pytest.fixture
def live(tmp_path) -> Live:
    """Versions 0 (as it was), 1 (full), 2 (delta)."""
    live = Live(make_model(tmp_path / "model"))
    for kind in ("full", "delta"):
        live.train()
        live.sync(kind)
    return live


def serve(config, model_dir: Path) -> None:
    write_manifest(
        Manifest(
            format=1, boot_id="b", pid=os.getpid(), pid_start_ticks=start_ticks(os.getpid()) or 0, rank=0,
            world_size=1, model_path=str(model_dir), served_model_name="m", vllm_version="0",
            torch_version="0", transport="shm", device_uuid=None, dtype="bfloat16", max_model_len=1,
            segments=[], tensors={}, views={}, refused=[],
        ),
        config.runtime_dir,
    )  # fmt: skip


def test_the_history_says_what_can_be_restored_and_what_it_takes(apollo, live):
    lines = apollo("checkpoint", "history", live.model_dir).stdout.splitlines()
    assert len(lines) == 5
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert "before the first sync" in lines[1]
    assert "delta" in lines[3]
    assert "the present one" in lines[3]
    shown = json.loads(apollo("checkpoint", "history", live.model_dir, "--json").stdout)
    assert [one["weight_version"] for one in shown["versions"]] == [0, 1, 2]
    assert 0 < shown["history_bytes"] < 20_000


def test_two_versions_are_compared_the_most_changed_tensor_first(apollo, live):
    told = apollo("checkpoint", "diff", "0", "2", "--model-dir", live.model_dir)
    assert told.stdout.startswith("3 of 4 tensors differ")
    shown = json.loads(apollo("checkpoint", "diff", "0", "2", "--model-dir", live.model_dir, "--json").stdout)
    norms = [one["relative_norm"] for one in shown["tensors"]]
    assert norms == sorted(norms, reverse=True)
    same = apollo("checkpoint", "diff", "1", "1", "--model-dir", live.model_dir).stdout
    assert same == "versions 1 and 1 hold the same weights\n"


def test_a_version_is_restored_where_nobody_serves(apollo, live):
    done = apollo("checkpoint", "restore", "1", "--model-dir", live.model_dir, "--yes")
    assert done.stdout.endswith("version 1 restored as version 3\n"), done.stderr
    assert_same(stored(live.model_dir), live.versions[1])
    assert apollo("checkpoint", "restore", "2", "--model-dir", live.model_dir, "--yes").returncode == 0
    assert_same(stored(live.model_dir), live.versions[2])
    assert verify(live.model_dir) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("restore", "7", "--yes"), "version: version 7 is not kept; there are: 0, 1, 2"),
        (("restore", "-1", "--yes"), "No such option"),
        (("restore", "one", "--yes"), "should be a valid integer"),
        (("diff", "1", "9"), "version: version 9 is not kept; there are: 0, 1, 2"),
        (("restore", "1", "--live", "--yes"), "is not being served; leave --live away"),
        (("snapshot",), "a command is needed after --"),
        (("snapshot", "--", "no-such-program"), "cannot run no-such-program: No such file or directory"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(apollo, live, arguments, message):
    name, *rest = arguments
    done = apollo("checkpoint", name, "--model-dir", live.model_dir, *rest)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n│ ", " ")
    assert "Traceback" not in done.stderr
    live.assert_all_readable(0, 1, 2)


def test_what_is_being_served_is_not_changed_behind_vllms_back(apollo, config, live):
    serve(config, live.model_dir)
    restored = apollo("checkpoint", "restore", "1", "--yes")
    assert restored.returncode == 2
    assert "give --live" in restored.stderr
    forgotten = apollo("checkpoint", "forget", live.model_dir, "--yes")
    assert "vLLM is serving this directory; stop it first" in forgotten.stderr
    live.assert_all_readable(0, 1, 2)


def test_without_yes_it_asks_and_no_is_no(apollo, live):
    done = apollo("checkpoint", "restore", "1", "--model-dir", live.model_dir, stdin="n\n")
    assert done.returncode == 1
    assert "Jobs trained since are undone" in done.stdout + done.stderr
    live.assert_all_readable(0, 1, 2)


def test_nothing_synced_yet_has_no_versions(apollo, tmp_path):
    model_dir = make_model(tmp_path / "new")
    for arguments in (("history", model_dir), ("diff", "0", "1", "--model-dir", model_dir)):
        done = apollo("checkpoint", *arguments)
        assert (done.returncode, "nothing was synced here yet" in done.stderr) == (2, True)
    assert "nothing to forget" in apollo("checkpoint", "forget", model_dir, "--yes").stdout


def test_forgetting_takes_the_shards_as_they_are(apollo, live):
    assert "forgotten" in apollo("checkpoint", "forget", live.model_dir, "--yes").stdout
    assert "never synced" in apollo("checkpoint", "show", live.model_dir).stdout


def test_a_commands_status_is_that_of_the_snapshot(apollo, live, tmp_path, capfd):
    out = tmp_path / "copy"
    copied = apollo(
        "checkpoint", "snapshot", "--model-dir", live.model_dir, "--", "cp", "-r", "{snapshot}", out
    )
    assert copied.returncode == 0
    assert verify(out) == []
    failed = apollo("checkpoint", "snapshot", "--model-dir", live.model_dir, "--", "sh", "-c", "exit 23")
    assert failed.returncode == 23
