"""Signals in quick succession: whoever ends a process twice must not hang it."""

from __future__ import annotations

import subprocess
import sys

from apollo_ipc.process.flag import Flag

# An alarm each 0.1 ms, whose handler sets what the interrupted code is setting. With threading.Event for Flag
# this never ends well.
STORM = """
import signal, time
from apollo_ipc.process.flag import Flag
flag = Flag()
signal.signal(signal.SIGALRM, lambda *_: flag.set())
signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
until = time.monotonic() + 0.5
while time.monotonic() < until:
    flag.set()
signal.setitimer(signal.ITIMER_REAL, 0)
print(flag.is_set())
"""


def test_a_flag_is_set_once_and_for_all():
    flag = Flag()
    assert not flag.is_set()
    flag.set()
    assert flag.is_set()


def test_a_handler_may_interrupt_itself():
    done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
