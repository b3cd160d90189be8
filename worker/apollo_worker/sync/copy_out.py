"""Live weights leave the training's way: copied into host memory, from where another thread writes them.

Training waits while the main thread copies (`put`); it goes on while the writer writes (`take`). What is
copied and not yet written is at most `budget_bytes`: beyond that the copying, and so training, waits. The
writer begins once all is copied, or the budget is used up: beside it the copying takes several times as long.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

ARENA_BYTES = 16 * 1024 * 1024
SLOT_BYTES = 256 * 1024
_MADV_POPULATE_WRITE = 23  # madvise(2)
FREE_FRACTION = 0.25  # of the memory that nobody uses


def budget_for(sizes_bytes: Iterable[int], least_bytes: int) -> int:
    """Bytes of host memory for a sync that copies tensors of `sizes_bytes`: room for all where that takes a
    quarter of what is free at most, else that quarter, but never less than `least_bytes`."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    # A slot holds bytes of one tensor, so the last one of each may be almost empty.
    all_bytes = sum(-(-size // SLOT_BYTES) * SLOT_BYTES for size in sizes_bytes)
    return min(all_bytes, max(least_bytes, int(free_bytes * FREE_FRACTION)))


class Arenas:
    """Host memory for one sync after the other.

    Fresh pages cost several times what copying into them does, so they are kept; between two syncs they are
    the kernel's for the taking (MADV_FREE of madvise(2)).
    """

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._lock = threading.Lock()
        self._is_used = False

    def slots(self, number: int) -> np.ndarray:
        """(slots, SLOT_BYTES) of arena `number`, to be written to until `give_back`."""
        with self._lock:
            self._is_used = True
        return np.frombuffer(self._map(number), np.uint8).reshape(-1, SLOT_BYTES)

    def _map(self, number: int) -> mmap.mmap:
        with self._lock:
            while number >= len(self._maps):
                arena = mmap.mmap(-1, ARENA_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                arena.madvise(mmap.MADV_HUGEPAGE)
                self._maps.append(arena)
            return self._maps[number]

    def give_back(self) -> None:
        """What they hold is lost from now on."""
        with self._lock:
            self._is_used = False
            self._free()

    def _free(self) -> None:
        for arena in self._maps:
            arena.madvise(mmap.MADV_FREE)

    def get(self, num_bytes: int) -> None:
        """Fresh pages for the next sync, while nobody waits. If it begins meanwhile, what it writes stays."""
        with suppress(OSError):  # a kernel before 5.14 does not have it: the first sync gets its own
            for number in range(-(-num_bytes // ARENA_BYTES)):
                self._map(number).madvise(_MADV_POPULATE_WRITE)
        with self._lock:
            if not self._is_used:
                self._free()


class CopyOut:
    """Tensors as a row of blocks, in the order in which both ends name them."""

    def __init__(self, budget_bytes: int, arenas: Arenas):
        self._arenas, self._num_arenas = arenas, 0
        self._num_slots_left = max(1, budget_bytes // SLOT_BYTES)  # that may still be got from there
        self._free: list[np.ndarray] = []
        self._waiting: deque[tuple[str, np.ndarray | None, int]] = deque()  # None: the end of the tensor
        self._news = threading.Condition()
        self._may_take = False
        self._error: BaseException | None = None

    def put(self, name: str, blocks: Iterator[torch.Tensor]) -> None:
        """Copies a tensor, given as 1-D CPU tensors, each valid until the next. Raises what `fail` got."""
        for block in blocks:
            # numpy copies on this thread alone; torch would wake its pool for every block.
            data = block.view(torch.uint8).numpy()
            for start in range(0, data.size, SLOT_BYTES):
                piece = data[start : start + SLOT_BYTES]
                slot = self._slot()
                np.copyto(slot[: piece.size], piece)
                self._append(name, slot, piece.size)
        self._append(name, None, 0)

    def _slot(self) -> np.ndarray:
        with self._news:
            if not self._free and self._num_slots_left:
                num_slots = min(self._num_slots_left, ARENA_BYTES // SLOT_BYTES)
                self._num_slots_left -= num_slots
                self._free.extend(self._arenas.slots(self._num_arenas)[:num_slots])
                self._num_arenas += 1
            if not self._free:
                self._let_take()
            self._news.wait_for(lambda: self._error or self._free)
            self._raise()
            return self._free.pop()

    def all_put(self) -> None:
        """Nothing more comes."""
        with self._news:
            self._let_take()

    def _let_take(self) -> None:
        self._may_take = True
        self._news.notify_all()

    def _append(self, name: str, slot: np.ndarray | None, num_bytes: int) -> None:
        with self._news:
            self._raise()
            self._waiting.append((name, slot, num_bytes))
            if self._may_take:
                self._news.notify_all()

    def take(self, name: str) -> Iterator[np.ndarray]:
        """The blocks of the next tensor, which must be `name`, as bytes; each valid until the next. Raises
        what `fail` was told."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._error or (self._may_take and self._waiting))
                self._raise()
                found, slot, num_bytes = self._waiting.popleft()
            assert found == name, f"{found} was copied where {name} is written"
            if slot is None:
                return
            yield slot[:num_bytes]
            with self._news:
                self._free.append(slot)
                self._news.notify_all()

    def fail(self, error: BaseException) -> None:
        """Either end, when it cannot go on: the other one raises `error` too. The first error stays."""
        with self._news:
            self._error = self._error or error
            self._free.clear()
            self._waiting.clear()
            self._news.notify_all()

    def close(self) -> None:
        """Gives the memory back. Neither end may be used any more."""
        self.fail(RuntimeError("this copy was closed"))
        self._arenas.give_back()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
