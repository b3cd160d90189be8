"""One run of the dream loop: whose turn it is, what it may still do, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from apollo_curation.dreams.seeds import Seed, newest_first
from apollo_curation.dreams.table import Dreams, SeedRecord, SeedState
from apollo_curation.settings import Dreaming as Settings

# done: every seed had its turn; budget: or a wish to stop; away: learner, judge or trainer; stopped: the
# training, by the quality monitor or a person.
EndedBy = Literal["done", "budget", "away", "stopped"]


class SeedResult(msgspec.Struct, frozen=True):
    """What one run did with one seed. num_rounds: trainings on it so far, in all runs."""

    seed_id: str
    topic: str
    state: SeedState
    reason: str
    num_dreams: int
    num_rounds: int


class Night(msgspec.Struct):
    """One run. ended: why it ended; ended_by: the kind of that.

    num_trained: dreams in the weights, the good ones included; num_failed: whose training failed;
    num_dropped: that came to nothing; num_repeats: situations that were no news.
    """

    seeds: list[SeedResult] = []
    num_dreams: int = 0
    num_good: int = 0
    num_bad: int = 0
    num_trained: int = 0
    num_failed: int = 0
    num_dropped: int = 0
    num_repeats: int = 0
    num_skipped_seeds: int = 0  # held or given up before, and unchanged
    ended: str = "every seed had its turn"
    ended_by: EndedBy = "done"

    def num_seeds(self, state: SeedState) -> int:
        return sum(seed.state == state for seed in self.seeds)


class Budget:
    """What a run may still do. stop: a person's or the night's wish to end."""

    def __init__(self, settings: Settings, stop: Callable[[], bool], clock: Callable[[], float]):
        self._settings = settings
        self._stop = stop
        self._clock = clock
        self._deadline = clock() + settings.max_seconds
        self._num_left = settings.max_dreams

    def take(self) -> None:
        self._num_left -= 1

    def ended(self) -> str | None:
        """Why nothing more is dreamt."""
        if self._stop():
            return "it was asked to stop"
        if self._num_left <= 0:
            return f"max_dreams ({self._settings.max_dreams}) were dreamt"
        if self._clock() >= self._deadline:
            return f"max_seconds ({self._settings.max_seconds:g}) have passed"
        return None


def in_turn(seeds: Iterable[Seed], dreams: Dreams, *, again: bool = False) -> list[SeedRecord]:
    """Seeds that were cut off, then those never dreamt of, then those left open for a reason of their own;
    of each the newest first. Without what was held or given up, unless `again`."""
    turns: list[tuple[int, SeedRecord]] = []
    for seed in newest_first(seeds):
        kept = dreams.seed(seed.seed_id)
        if kept is None:
            turns.append((1, SeedRecord(seed)))
        elif kept.state == "open":
            turns.append((2 if kept.reason else 0, msgspec.structs.replace(kept, seed=seed)))
        elif again:
            turns.append((1, msgspec.structs.replace(kept, seed=seed)))
    return [record for _, record in sorted(turns, key=lambda turn: turn[0])]
