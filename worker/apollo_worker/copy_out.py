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


class CopyOut:
    """Tensors as a row of blocks, in the order in which both ends name them."""

    def __init__(self, budget_bytes: int):
        self._budget_bytes = budget_bytes
        self._waiting: deque[tuple[str, np.ndarray | None]] = (
            deque()
        )  # None: the tensor's last block was before
        self._held_bytes = 0
        self._news = threading.Condition()
        self._error: BaseException | None = None

    def put(self, name: str, blocks: Iterator[torch.Tensor]) -> None:
        """Copies a tensor, given as 1-D CPU tensors, each valid until the next. Raises what `fail` got."""
        for block in blocks:
            # numpy copies on this thread alone; torch would wake its pool for every block.
            data = block.view(torch.uint8).numpy().copy()
            self._append(name, data)
        self._append(name, None)

    def _append(self, name: str, data: np.ndarray | None) -> None:
        size = 0 if data is None else data.nbytes
        with self._news:
            self._news.wait_for(lambda: self._error or self._has_room(size))
            self._raise()
            self._waiting.append((name, data))
            self._held_bytes += size
            self._news.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        return not self._held_bytes or self._held_bytes + num_bytes <= self._budget_bytes

    def take(self, name: str) -> Iterator[np.ndarray]:
        """The blocks of the next tensor, which must be `name`, as bytes. Raises what `fail` was told."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._error or self._waiting)
                self._raise()
                found, data = self._waiting.popleft()
            assert found == name, f"{found} was copied where {name} is written"
            if data is None:
                return
            yield data
            with self._news:
                self._held_bytes -= data.nbytes
                self._news.notify_all()

    def fail(self, error: BaseException) -> None:
        """Either end, when it cannot go on: the other one raises `error` too. The first error stays."""
        with self._news:
            self._error = self._error or error
            self._news.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
