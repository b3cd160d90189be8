"""The threads of an update on a CPU: a large parameter is shared out, small ones are taken in turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from threading import Barrier
from typing import Any

import torch

from apollo_worker.optimizer.update import Work, Written

MIN_PART_ELEMENTS = 2**18  # below this a second thread costs more than it saves


class Threads:
    """As many as torch may use, made by the training thread: they inherit its scheduling class."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._is_busy = False  # every thread has work of its own: nothing is shared out

    def num_parts(self, num_rows: int, num_elements: int) -> int:
        """In which `share` divides that."""
        most = 1 if self._is_busy else torch.get_num_threads()
        return max(1, min(most, num_rows, num_elements // MIN_PART_ELEMENTS))

    def share(self, kernel: Callable[..., Any], num_rows: int, num_elements: int, *arguments: Any) -> None:
        """kernel(first row, end row, *arguments) over all rows, in parts, side by side."""
        num_parts = self.num_parts(num_rows, num_elements)
        ends = [num_rows * (i + 1) // num_parts for i in range(num_parts)]
        starts = [0, *ends[:-1]]
        waiting = [
            self._started().submit(kernel, start, end, *arguments)
            for start, end in zip(starts[1:], ends[1:], strict=True)
        ]
        kernel(0, ends[0], *arguments)
        for part in waiting:
            part.result()

    def each(self, work: list[Work]) -> list[Written]:
        """Runs all of it, several at a time, and returns what it returned, in any order.

        Not in the calling thread, whose products of matrices would be shared out among torch's threads: these
        threads' are not. One that is slow to wake up is not waited for. Raises what one of them raised.
        """
        if len(work) <= 1 or self._is_busy or torch.get_num_threads() == 1:
            return [one() for one in work]
        left: deque[Work] = deque(work)
        done: list[Written] = []

        def take_turns() -> None:
            while left:
                try:
                    one = left.popleft()
                except IndexError:
                    return
                done.append(one())

        pool, self._is_busy = self._started(), True
        try:
            turns = [pool.submit(take_turns) for _ in range(min(len(work), torch.get_num_threads()))]
            wait(turns, return_when=FIRST_COMPLETED)
            turns = [turn for turn in turns if not turn.cancel()]  # what had not begun has nothing to do
            wait(turns)
        finally:
            self._is_busy = False
        for turn in turns:
            turn.result()
        return done

    def _started(self) -> ThreadPoolExecutor:
        if self._pool is None:
            num = torch.get_num_threads()
            self._pool, all_started = ThreadPoolExecutor(num, "apollo-step"), Barrier(num)
            wait([self._pool.submit(_multiply_alone, all_started) for _ in range(num)])
            torch.set_num_threads(num)  # for threads to come: _multiply_alone has changed that
        return self._pool


def _multiply_alone(all_started: Barrier) -> None:
    """This thread's products are made by it alone (ATen/ParallelOpenMP.cpp: the first question for the number
    fixes it for a thread). Waits until every thread has done so."""
    torch.set_num_threads(1)
    torch.get_num_threads()
    all_started.wait()
