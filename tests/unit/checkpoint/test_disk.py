"""The layer of durable file operations."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from apollo_ipc.checkpoint.disk import DISK
from apollo_ipc.errors import CheckpointError


def test_a_file_is_created_with_the_mode_that_was_asked_for(tmp_path):
    old_umask = os.umask(0o077)
    try:
        file = DISK.create(tmp_path / "shard", 0o664)
    finally:
        os.umask(old_umask)
    DISK.write(file, b"abc")
    DISK.write(file, memoryview(b"def"))
    DISK.sync(file)
    DISK.close(file)
    assert (tmp_path / "shard").read_bytes() == b"abcdef"
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o664


def test_a_write_that_the_kernel_cuts_short_goes_on(tmp_path, monkeypatch):
    write = os.write
    file = DISK.create(tmp_path / "shard")
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3] if fd == file.fd else data))
    DISK.write(file, b"0123456789")
    monkeypatch.undo()
    DISK.close(file)
    assert (tmp_path / "shard").read_bytes() == b"0123456789"


def test_a_failed_operation_names_the_path_and_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot rename a file to .*/b: No such file") as caught:
        DISK.rename(tmp_path / "a", tmp_path / "b")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("operation", ["fdatasync", "fsync"])
def test_a_failed_flush_is_asked_for_once(tmp_path, monkeypatch, operation):
    calls = []

    def fail(fd):
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = DISK.create(tmp_path / "shard")
    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(CheckpointError, match=r"cannot flush .*: Input/output error"):
        DISK.sync(file) if operation == "fdatasync" else DISK.sync_dir(tmp_path)
    assert len(calls) == 1
    DISK.close(file)


def test_a_lock_is_waited_for_and_then_refused(tmp_path):
    lock = tmp_path / ".apollo" / "lock"
    lock.parent.mkdir()
    with DISK.lock(lock, 1.0):
        started = time.monotonic()
        with pytest.raises(CheckpointError, match="another process is using"), DISK.lock(lock, 0.1):
            pass
        assert 0.1 <= time.monotonic() - started < 5
    with DISK.lock(lock, 0.0):
        pass


def test_a_waiting_locker_gets_the_lock_when_it_is_released(tmp_path):
    order = []

    def second():
        with DISK.lock(tmp_path / "lock", 10.0):
            order.append("second")

    with DISK.lock(tmp_path / "lock", 0.0):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from apollo_ipc.checkpoint.disk import DISK\n"
        "with DISK.lock(Path(sys.argv[1]), 0): print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError), DISK.lock(tmp_path / "lock", 0.0):
            pass
        holder.kill()
    with DISK.lock(tmp_path / "lock", 0.0):
        pass


def test_the_durable_layer_and_the_checkpoint_import_no_torch():
    code = "import sys, apollo_ipc.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
