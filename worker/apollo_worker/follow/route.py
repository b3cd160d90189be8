"""How to come from the bytes that are here to those of another version, with the fewest bytes from afar.

live --difference--> its shard's --difference--> target        digests are the places, differences the ways
the source's shard, whole ----------difference--> target       where no way leads from what is live
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from apollo_ipc.checkpoint.record import Commit


class Frame(msgspec.Struct, frozen=True):
    """A difference that turns bytes of digest `base` into `result`. file: in the source's .apollo, bytes
    start to end; empty: it is kept here."""

    name: str
    base: str
    result: str
    file: str = ""
    start: int = 0
    end: int = 0


class Step(NamedTuple):
    frame: Frame
    is_reverse: bool


class Route(NamedTuple):
    """From what is live, or from the source's shard; the differences in turn."""

    is_whole: bool
    steps: list[Step]
    num_bytes: int  # from the source


def frames_of(commit: Commit) -> dict[str, list[Frame]]:
    """Tensor -> the differences that the source keeps of it."""
    found: dict[str, list[Frame]] = {}
    for delta in commit.deltas():
        for name, one in delta.tensors.items():
            found.setdefault(name, []).append(
                Frame(name, one.base, one.result, delta.file.name, one.start, one.end)
            )
    return found


def route(
    live: str, in_shard: str | None, size_bytes: int, target: str, frames: Iterable[Frame]
) -> Route | None:
    """live, in_shard, target: digests; in_shard: of the source's shard, `size_bytes` whole, None where it is
    not known. None where no way leads there."""
    ways: dict[str, list[tuple[str, Step]]] = {}
    for frame in frames:
        ways.setdefault(frame.base, []).append((frame.result, Step(frame, False)))
        ways.setdefault(frame.result, []).append((frame.base, Step(frame, True)))
    # (bytes, a number that decides between equals, digest, route)
    heap: list[tuple[int, int, str, Route]] = [(0, 0, live, Route(False, [], 0))]
    if in_shard is not None:
        heapq.heappush(heap, (size_bytes, 1, in_shard, Route(True, [], size_bytes)))
    seen: set[str] = set()
    count = 2
    while heap:
        num_bytes, _, at, way = heapq.heappop(heap)
        if at == target:
            return way
        if at in seen:
            continue
        seen.add(at)
        for there, step in ways.get(at, []):
            more = num_bytes + (step.frame.end - step.frame.start if step.frame.file else 0)
            heapq.heappush(heap, (more, count, there, Route(way.is_whole, [*way.steps, step], more)))
            count += 1
    return None
