"""Flagged moments, and a review of them on a pipe."""

from __future__ import annotations

import io
import os
import sys
from unittest.mock import patch

from rich.console import Console

from apollo_curation.logs.conversation import Origin
from apollo_curation.moments.moments import Moment
from apollo_curation.moments.review_screen import run
from apollo_ipc.wire.requests import Message

WRONG, RIGHT = Message("assistant", "It is 41."), Message("assistant", "It is 42.")
FUNCTION = {"name": "ls", "arguments": '{"p": 1}'}
CALL = Message("assistant", "", tool_calls=[{"id": "c", "function": FUNCTION}])


def moment(number, **changes):
    values = {
        "kind": "correction", "tier": "direct", "context": [Message("user", f"Question {number}?")],
        "answer": RIGHT, "source": Origin("log.jsonl", number, 0), "topic": "t",
        "reason": "The user objects.",
        "confidence": 0.5, "original": WRONG, "created_at": float(number), "surprise": 2.0,
    }  # fmt: skip
    return Moment(**(values | changes))


def states(moments):
    return [one.state for one in moments.list()]


def screen(review, lines, **environ):
    """What a review on a pipe shows."""
    out = io.StringIO()
    console = Console(file=out, width=200, highlight=False, markup=False)
    with patch.dict(os.environ, environ):
        run(review, console, io.StringIO(lines))
    return out.getvalue()


def editor(tmp_path, text):
    """The command of an editor that writes `text` whatever it is given."""
    script = tmp_path / "editor.py"
    script.write_text(f"import sys; open(sys.argv[1], 'w').write({text!r})")
    return f"{sys.executable} {script}"
