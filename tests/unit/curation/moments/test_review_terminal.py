"""A review as a person meets it, in a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import sys
import termios
import time

from review_moments import editor, states

from apollo_ipc.wire.requests import Message

SCREEN = "import typer; from apollo_curation.cli.curate_review import review; typer.run(review)"


class Terminal:
    """A command in a pseudo-terminal, as a person meets it."""

    def __init__(self, arguments, environ):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execve(arguments[0], arguments, environ)
        self.shown = ""
        self.is_asked_for_a_line = False

    def wait_for(self, text, timeout_s=20.0):
        """Everything up to and with `text`, which is taken out of what was shown."""
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            if not select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come, but {self.shown!r}")
            try:
                new = os.read(self.fd, 65536)
            except OSError:
                new = b""
            if not new:
                raise AssertionError(f"ended before {text!r}: {self.shown!r}")
            self.shown += new.decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def press(self, keys):
        """What is pressed before somebody waits for a key is no answer to what is shown then."""
        deadline = time.monotonic() + 20
        while termios.tcgetattr(self.fd)[3] & termios.ICANON and not self.is_asked_for_a_line:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.write(self.fd, keys.encode())

    def end(self):
        while True:  # or the child waits for somebody to read
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_person_reviews_in_a_terminal(moments, environment, tmp_path):
    environ = dict(os.environ) | {
        "TERM": "xterm-256color",
        "EDITOR": editor(tmp_path, "Forty-two."),
        "COLUMNS": "100",
    }
    terminal = Terminal([sys.executable, "-c", SCREEN], environ)
    first = terminal.wait_for("[q] quit")
    assert "Question 1?" in first
    assert "\x1b[9;31m41" in first.replace("\x1b[31;9m", "\x1b[9;31m")  # in red and struck through
    assert "4 left" in first
    terminal.press("\x1bOq")  # a key of the number pad is no answer, and no `q`
    terminal.wait_for("none of")
    terminal.press("a")
    terminal.wait_for("Question 2?")
    assert states(moments) == [
        "approved",
        "flagged",
        "flagged",
        "flagged",
    ]  # kept before anything else is done
    terminal.wait_for("[q] quit")
    terminal.press("r")
    terminal.wait_for("why?")
    terminal.is_asked_for_a_line = True
    terminal.press("a joke\n")
    terminal.is_asked_for_a_line = False
    terminal.wait_for("Question 3?")
    terminal.wait_for("[q] quit")
    terminal.press("e")
    terminal.wait_for("Question 4?")
    terminal.wait_for("[q] quit")
    terminal.press("q")
    terminal.wait_for("1 flagged are left")
    assert terminal.end() == 0
    one, two, three, four = moments.list()
    assert [one.state, two.state, three.state, four.state] == ["approved", "rejected", "approved", "flagged"]
    assert two.decided_reason == "a joke"
    assert three.answer == Message("assistant", "Forty-two.")


def test_ctrl_c_leaves_the_terminal_as_it_was_and_the_decisions_kept(moments, environment):
    terminal = Terminal([sys.executable, "-c", SCREEN], dict(os.environ) | {"TERM": "xterm"})
    before = termios.tcgetattr(terminal.fd)
    terminal.wait_for("[q] quit")
    terminal.press("a")  # without Enter
    terminal.wait_for("Question 2?")
    terminal.wait_for("[q] quit")
    terminal.press("\x03")
    terminal.wait_for("1 approved; 3 flagged are left")
    assert termios.tcgetattr(terminal.fd) == before
    assert terminal.end() != 0
    assert states(moments) == ["approved", "flagged", "flagged", "flagged"]
