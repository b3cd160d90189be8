"""Python runs this at its start where PYTHONPATH leads here: which files of ours have functions that run.

$APOLLO_TRACE-PID gets a line for each function that is called, the first time.
"""

from __future__ import annotations

import os
import sys
import threading
from types import CodeType, FrameType
from typing import Any

_seen: set[CodeType] = set()


def note(frame: FrameType, event: str, _: Any) -> None:
    code = frame.f_code
    if event == "call" and code not in _seen:
        _seen.add(code)
        if "/apollo_" in code.co_filename and code.co_name != "<module>":
            with open(f"{os.environ['APOLLO_TRACE']}-{os.getpid()}", "a") as file:
                file.write(f"{code.co_filename}\n")


if "APOLLO_TRACE" in os.environ:
    threading.setprofile(note)
    sys.setprofile(note)
