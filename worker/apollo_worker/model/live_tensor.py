"""A live tensor: a view of the memory that vLLM serves from, or the pieces of one that several ranks hold.

The functions here are what all else reads and writes live weights by. Of a view nothing is copied.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_worker.model.host_buffer import as_integers


class Part(NamedTuple):
    """What one rank holds: `live`, of any strides, has the elements that lie in the whole, contiguous tensor
    at these strides from `offset` on, in elements."""

    live: Tensor
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        return whole.as_strided(self.live.shape, self.stride, whole.storage_offset() + self.offset)


class Pieced:
    """A tensor of which each rank of vLLM holds parts; together they are all of it, some of it several times.

    It has no memory of its own. The whole is on the first part's device. Parts of another rank may lie on
    another device.
    """

    def __init__(self, shape: Sequence[int], parts: Sequence[Part]):
        self.shape, self.parts = torch.Size(shape), list(parts)
        self.dtype, self.device = parts[0].live.dtype, parts[0].live.device
        self.is_cuda, self.nbytes = self.device.type == "cuda", self.shape.numel() * self.dtype.itemsize

    def gather(self) -> Tensor:
        whole, read = torch.empty(self.shape, dtype=self.dtype, device=self.device), set()
        for part in self.parts:
            place = part.offset, part.stride, part.live.shape
            if place not in read:  # replicas hold the same
                read.add(place)
                part.of(whole).copy_(part.live)
        return whole

    def scatter(self, whole: Tensor) -> None:
        """Into every part. whole: contiguous, of this shape and any dtype or device."""
        for part in self.parts:
            part.live.copy_(part.of(whole))

    def replicas_agree(self, whole: Tensor) -> bool:
        """Whether every part holds what `whole` (of `gather`) has there, bit for bit."""
        return all(
            torch.equal(
                as_integers(part.of(whole).contiguous()), as_integers(part.live.contiguous().to(whole.device))
            )
            for part in self.parts
        )

    def parts_within(self, tensor: Tensor) -> list[Part]:
        """The same parts as those of a larger tensor, of which this one is the view `tensor`."""
        found = []
        for part in self.parts:
            start, rest = [], part.offset
            for step in part.stride:
                index, rest = divmod(rest, step)
                start.append(index)
            at = sum(index * step for index, step in zip(start, tensor.stride(), strict=True))
            found.append(Part(part.live, tensor.stride(), int(tensor.storage_offset()) + at))
        return found

    def placeholder(self) -> Tensor:
        """Of the shape, the dtype and the device, without memory. Who computes with it gets NaN."""
        return torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(self.shape)


LiveTensor = Tensor | Pieced


@torch.no_grad()
def whole(live: LiveTensor) -> Tensor:
    """To be read: the memory itself, or a copy of the pieces."""
    return live.gather() if isinstance(live, Pieced) else live.detach()


@contextmanager
def opened(live: LiveTensor) -> Generator[Tensor]:
    """To be changed in place: the memory itself, or a copy that goes back into all pieces at the end."""
    with torch.no_grad():
        tensor = whole(live)
        yield tensor
        if isinstance(live, Pieced):
            live.scatter(tensor)


@torch.no_grad()
def write(live: LiveTensor, values: Tensor) -> None:
    """In place. values: of the same shape, contiguous, on any device."""
    if isinstance(live, Pieced):
        live.scatter(values)
    else:
        live.copy_(values)


def agrees(live: LiveTensor, tensor: Tensor) -> bool:
    """Whether what several ranks hold is the same in each. tensor: of `whole`."""
    return not isinstance(live, Pieced) or live.replicas_agree(tensor)


def place(live: LiveTensor) -> tuple[object, ...]:
    """The same for two names of one tensor."""
    parts = [part.live for part in live.parts] if isinstance(live, Pieced) else [live]
    return tuple((part.data_ptr(), part.shape, part.stride(), part.dtype) for part in parts)
