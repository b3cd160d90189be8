"""What takes longer than a moment says what it does: a line that moves on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Doing(Protocol):
    """Call it with each new phase, and inside one with how far it is."""

    def __call__(self, what: str, done: int = 0, total: int | None = None, *, note: str = "") -> None: ...


def say_nothing(what: str, done: int = 0, total: int | None = None, *, note: str = "") -> None:
    """A Doing for callers that nobody watches."""


@contextmanager
def progress(what: str, *, is_quiet: bool = False) -> Iterator[Doing]:
    """On standard error while the block runs, and only where that is a terminal: what is piped or recorded
    (systemd, cron, --json into a file) gets no line of it. Gone when the block ends."""
    if is_quiet or not sys.stderr.isatty():
        yield say_nothing
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = [
        SpinnerColumn("line"),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    ]
    counted = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns[2:]]
    shown = Progress(
        *columns,
        console=Console(stderr=True, highlight=False, markup=False),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed meanwhile would go to the terminal
    )
    with shown:
        task = shown.add_task(what, total=None, note="")

        def doing(what: str, done: int = 0, total: int | None = None, *, note: str = "") -> None:
            shown.columns = tuple(columns if total is None else counted)
            shown.update(task, description=what, completed=done, total=total, note=note)

        yield doing
