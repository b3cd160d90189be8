"""The terminal of a review: shows a moment, waits for a key, does it; by lines where it is none."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console

from apollo_curation.moments.moments import Moment
from apollo_curation.moments.review import KEYS, Review, editable, edited
from apollo_curation.moments.review_view import print_view
from apollo_ipc.errors import NotFound, UserError

END_KEYS = ("\x04", "")  # Ctrl-D, the end of the input; Ctrl-C interrupts


def run(review: Review, console: Console, keys: Keys, environ: Mapping[str, str] = os.environ) -> None:
    """Until everything is decided or the reviewer quits; what he decided is kept by then."""
    whole = False
    problem = ""
    while (shown := review.current) is not None:
        if keys.is_terminal:
            console.clear()
        print_view(console, shown, whole=whole)
        if problem:
            console.print(problem, style="bold red")
        offered = "  ".join(f"[{key}] {words}" for key, words in KEYS.items())
        console.print(f"{review.num_left} left   {offered}", style="dim")
        key, words = keys.read()
        problem = ""
        if key in END_KEYS or key == "q":
            break
        whole = key == "m" and not whole
        if key != "m":
            problem = _do(review, shown, key, words, keys, environ)
        if problem and not keys.is_terminal:
            console.print(problem, style="bold red")
            problem = ""


def _do(review: Review, shown: Moment, key: str, words: str, keys: Keys, environ: Mapping[str, str]) -> str:
    """Does what the key says; what stood in the way, or nothing."""
    try:
        match key:
            case "a":
                review.approve(shown)
            case "e":
                with keys.lent():
                    text = edit(editable(shown), environ)
                answer = edited(text, shown.answer or shown.original)
                if answer == shown.answer:
                    return "nothing was changed; [a] approves it as it is"
                review.approve(shown, answer)
            case "r":
                review.reject(shown, words)
            case "s":
                review.skip()
            case "b":
                return "" if review.back() else "this is the first one"
            case _:
                return f"{key!r} is none of {', '.join(KEYS)}"
    except (UserError, NotFound) as error:
        now = review.current
        if now is not None and now.state != shown.state:
            review.pass_over()
        return error.message
    return ""


def edit(text: str, environ: Mapping[str, str]) -> str:
    """`text` through the person's editor. Raises UserError where there is none or it failed."""
    command = environ.get("VISUAL") or environ.get("EDITOR")
    if not command:
        raise UserError("set EDITOR to the editor that you want, for example EDITOR=nano")
    with tempfile.TemporaryDirectory(prefix="apollo-review-") as directory:
        path = Path(directory) / "answer.txt"
        path.write_text(text)
        try:
            done = subprocess.run([*shlex.split(command), str(path)])
        except (OSError, ValueError) as error:
            raise UserError(f"cannot run {command!r}: {error}") from None
        if done.returncode:
            raise UserError(f"{command} ended with {done.returncode}; nothing was changed")
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"what {command} wrote cannot be read: {error}") from None


class Keys:
    """Keys of a terminal as they are pressed; of anything else lines: a key, and words after it.

    `with Keys(sys.stdin) as keys:`; the terminal is as it was at the end, whatever happens.
    """

    def __init__(self, stream: TextIO = sys.stdin):
        self._stream = stream
        self.is_terminal = stream.isatty()
        self._before: list | None = None

    def __enter__(self) -> Keys:
        if self.is_terminal:
            import termios
            import tty

            self._before = termios.tcgetattr(self._stream)
            tty.setcbreak(self._stream)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def read(self) -> tuple[str, str]:
        """The key, and what stands behind it; an empty key at the end of the input."""
        if not self.is_terminal:
            line = self._stream.readline()
            if not line:
                return "", ""
            key, _, words = line.strip().partition(" ")
            return key or "s", words.strip()
        key = self._bytes(1).decode(errors="replace")
        if key == "\x1b":  # of an arrow or function key; what comes with it is no answer
            import termios

            termios.tcflush(self._stream, termios.TCIFLUSH)
        if key == "r":
            with self.lent():
                return key, self._ask("why? (Enter for no reason) ")
        return key, ""

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The terminal as other programs expect it."""
        if not self.is_terminal:
            yield
            return
        import tty

        self._restore()
        try:
            yield
        finally:
            tty.setcbreak(self._stream)

    def _restore(self) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(self._stream, termios.TCSADRAIN, self._before)

    def _ask(self, prompt: str) -> str:
        """A line, not through the stream's buffer: it would keep the keys that were pressed ahead."""
        print(prompt, end="", flush=True)
        return self._bytes(4096).decode(errors="replace").strip()

    def _bytes(self, num: int) -> bytes:
        try:
            return os.read(self._stream.fileno(), num)
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal was closed
                raise
            return b""
