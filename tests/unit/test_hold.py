"""One holder of a lock at a time, which says who it is."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys

import pytest

from apollo_ipc.checkpoint.disk import DISK, is_locked
from apollo_ipc.checkpoint.owner import hold_model
from apollo_ipc.errors import CheckpointError
from apollo_ipc.hold import Held, Hold

HOLD_AND_SLEEP = """
import sys, time
from pathlib import Path
from apollo_ipc.hold import Hold
hold = Hold(Path(sys.argv[1]), "the worker")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_holder_is_told_who_the_first_is(tmp_path):
    path = tmp_path / "lock"
    with Hold(path, "the worker"), pytest.raises(Held) as refused:
        Hold(path, "another")
    assert refused.value.who.startswith(f"the worker (pid {os.getpid()}, since 2")
    assert refused.value.message.endswith(f"holds {path}")
    assert path.stat().st_mode & 0o777 == 0o600
    with Hold(path, "a third"), pytest.raises(Held, match="a third"):
        Hold(path, "another")


def test_a_killed_holder_holds_nothing_whatever_it_wrote(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_SLEEP, path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Held, match=f"pid {process.pid}"):
        Hold(path, "another")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert str(process.pid) in path.read_text(), "its words are left, and mean nothing"
    with Hold(path, "another"), pytest.raises(Held, match=f"pid {os.getpid()}"):
        Hold(path, "a third")


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path):
    path = tmp_path / "lock"
    with Hold(path, "the parent"):
        awake, wake = os.pipe()
        if (child := os.fork()) == 0:
            os.close(wake)
            os.read(awake, 1)
            os._exit(0)
    with Hold(path, "the next"):
        pass
    os.close(awake)
    os.close(wake)
    os.waitpid(child, 0)


@pytest.mark.parametrize("words", [b"", b"4711\n", b"{}", b'{"pid": 1', b"\xff" * 100])
def test_a_holder_that_says_nothing_readable_is_another_process(tmp_path, words):
    path = tmp_path / "lock"
    path.write_bytes(words)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Held, match="another process holds"):
            Hold(path, "another")
    finally:
        os.close(fd)


def test_a_symlink_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        Hold(tmp_path / "lock", "the worker")
    assert (tmp_path / "target").read_text() == "precious"


def test_a_file_system_without_locks_is_warned_of_once_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(fd, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with Hold(tmp_path / "lock", "the worker"):
                pass
        with DISK.lock(tmp_path / "checkpoint", 0.0):
            pass
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        f"{tmp_path / 'lock'} cannot be locked",
        f"{tmp_path / 'checkpoint'} cannot be locked",
    ]
    assert is_locked(tmp_path), "a snapshot may still be read: it is not removed"


def test_a_model_directory_has_one_writer(tmp_path):
    with hold_model(tmp_path, "the worker"), pytest.raises(CheckpointError) as refused:
        hold_model(tmp_path, "apollo-ipc train --offline")
    assert refused.value.code == "model_held"
    assert f"the worker (pid {os.getpid()}, since 2" in refused.value.message
    assert f"works on the model directory {tmp_path}" in refused.value.message


def test_a_model_directory_that_is_only_read_needs_no_lock(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    assert hold_model(tmp_path, "the worker") is None
