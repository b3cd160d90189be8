"""Live weights leave the training's way: copied into host memory, from where another thread writes them.

Training waits while the main thread copies (`put`); it goes on while the writer still writes (`take`). What
is copied and not yet written is at most `budget_bytes`: beyond that the copying, and so training, waits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

# Memory is got from the system in arenas (numpy asks for huge pages from 4 MiB on) and used again in slots: a
# block of fresh pages each time would cost more than the copying.
ARENA_BYTES = 16 * 1024 * 1024
SLOT_BYTES = 1024 * 1024


class CopyOut:
    """Tensors as a row of blocks, in the order in which both ends name them."""

    def __init__(self, budget_bytes: int):
        self._num_slots_left = max(1, budget_bytes // SLOT_BYTES)  # that may still be got from the system
        self._free: list[np.ndarray] = []
        self._waiting: deque[tuple[str, np.ndarray | None, int]] = deque()  # None: the end of the tensor
        self._news = threading.Condition()
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
                self._free.extend(np.empty((num_slots, SLOT_BYTES), np.uint8))
            self._news.wait_for(lambda: self._error or self._free)
            self._raise()
            return self._free.pop()

    def _append(self, name: str, slot: np.ndarray | None, num_bytes: int) -> None:
        with self._news:
            self._raise()
            self._waiting.append((name, slot, num_bytes))
            self._news.notify_all()

    def take(self, name: str) -> Iterator[np.ndarray]:
        """The blocks of the next tensor, which must be `name`, as bytes; each valid until the next. Raises
        what `fail` was told."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._error or self._waiting)
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
            self._news.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
