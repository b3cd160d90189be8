"""What a signal handler may set."""

from __future__ import annotations


class Flag:
    """As much of threading.Event as needs no lock. An Event's lock may be held by the very thread that the
    handler interrupts, for instance in `set` when a second signal comes: it would wait for itself."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set
