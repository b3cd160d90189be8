"""The terminal of a review: shows a moment, waits for a key, does it; by lines where it is none."""

from __future__ import annotations

from typing import TextIO

import click
from rich.console import Console

from apollo_curation.moments.moments import Moment
from apollo_curation.moments.review import KEYS, Review, editable, edited
from apollo_curation.moments.review_view import print_view
from apollo_ipc.errors import NotFound, UserError


def run(review: Review, console: Console, keys: TextIO) -> None:
    """Until everything is decided, the reviewer quits or `keys` ends; what he decided is kept by then.

    keys: a terminal, whose keys count as they are pressed; else lines, each a key and words after it.
    """
    is_terminal = keys.isatty()
    is_whole, problem = False, ""
    while (shown := review.current) is not None:
        if is_terminal:
            console.clear()
        print_view(console, shown, whole=is_whole)
        if problem:
            console.print(problem, style="bold red")
        offered = "  ".join(f"[{key}] {words}" for key, words in KEYS.items())
        console.print(f"{review.num_left} left   {offered}", style="dim")
        key, words = _pressed() if is_terminal else _line(keys)
        if key in ("", "q"):
            break
        is_whole = key == "m" and not is_whole
        problem = "" if key == "m" else _do(review, shown, key, words)
        if problem and not is_terminal:
            console.print(problem, style="bold red")
            problem = ""


def _pressed() -> tuple[str, str]:
    """A key (of an arrow or function key all its characters), and the reason of a rejection. No key at the
    end of the input; Ctrl-C interrupts."""
    try:
        key = click.getchar()
        if key == "r":
            return key, input("why? (Enter for no reason) ").strip()
    except EOFError:
        return "", ""
    return key, ""


def _line(keys: TextIO) -> tuple[str, str]:
    line = keys.readline()
    key, _, words = line.strip().partition(" ")
    return key or ("s" if line else ""), words.strip()


def _do(review: Review, shown: Moment, key: str, words: str) -> str:
    """Does what the key says; what stood in the way, or nothing."""
    try:
        match key:
            case "a":
                review.approve(shown)
            case "e":
                try:
                    text = click.edit(editable(shown))
                except click.ClickException as error:
                    return f"{error.message}; nothing was changed"
                answer = None if text is None else edited(text, shown.answer or shown.original)
                if answer is None or answer == shown.answer:
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
