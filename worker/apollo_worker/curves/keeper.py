"""What a library that keeps curves has to do. Each module to_*.py is one of them, and imports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

PROJECT = "apollo-ipc"  # unless the library's own environment names another


class Run(NamedTuple):
    """One curve. run_id: the same whoever asks for it again; facts: what stands beside it, for good."""

    run_id: str
    name: str
    facts: dict[str, Any]


class Point(NamedTuple):
    step: int
    values: dict[str, float]


class OpenRun(Protocol):
    """Every method may block, and raises whatever the library raises. last_step: of the newest point that
    the library has of it already, from an earlier process too; 0 where there is none or it cannot say."""

    last_step: int

    def add(self, points: Sequence[Point]) -> None:
        """In the order of their steps; kept, as far as the library lets us know, when it returns."""
        ...

    def close(self, ended: str | None) -> None:
        """ended: the state in which the job ended; None: another process may go on with the run."""
        ...


Keeper = Callable[[Run], OpenRun]
