"""Progress: on a terminal a line that moves and goes; where standard error is piped, nothing at all."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time

import pytest
from synced_weights import Live, make_model

APOLLO_IPC = [sys.executable, "-m", "apollo_ipc"]
COUNTED = """
import sys, time
from apollo_ipc.process.progress import progress
with progress("first") as doing:
    time.sleep(0.3)
    for step in range(1, 4):
        doing("training", step, 3, note=f"loss {step}")
        print(f"a line {step}", file=sys.stderr)
        print(f"a row {step}")
        time.sleep(0.3)
print("the result")
"""
RESULT = "a row 1\na row 2\na row 3\nthe result\n"


def on_a_terminal(command) -> tuple[str, str, int]:
    """(standard output, piped; what the terminal got; the exit status)."""
    ours, theirs = os.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        seen, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    seen += os.read(ours, 65536)
                except OSError:  # EIO: nobody has the other end any more
                    break
        os.close(ours)
        assert process.stdout is not None
        out = process.stdout.read()
    return out, seen.decode(), process.returncode


def words(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_on_a_terminal_each_phase_and_step_is_shown_and_the_line_goes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out, seen, status = on_a_terminal([sys.executable, "-c", COUNTED])
    assert (out, status) == (RESULT, 0), "what is printed meanwhile is not the terminal's"
    shown = words(seen)
    for part in ("first", "training", "3/3", "loss 3", "a line 2"):
        assert part in shown
    assert seen.rstrip().endswith(("\x1b[2K", "\x1b[?25h")), "the line is wiped, the cursor is back"


def test_what_is_piped_gets_no_line_of_it():
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (RESULT, "a line 1\na line 2\na line 3\n")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_verify_counts_tensors_where_somebody_looks(tmp_path, is_terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    live = Live(make_model(tmp_path / "model"))
    live.train()
    live.sync()
    command = [*APOLLO_IPC, "checkpoint", "verify", str(tmp_path / "model")]
    if is_terminal:
        out, seen, status = on_a_terminal(command)
        assert "reading" in words(seen)
    else:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        out, seen, status = done.stdout, done.stderr, done.returncode
        assert seen == ""
    assert (out, status) == (f"{tmp_path / 'model'}: every digest is right\n", 0)
