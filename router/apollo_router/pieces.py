"""What one rank of several holds of each checkpoint tensor: views.py's recording as boxes.

A rank's own loader copies its part of a tensor (rows of a column-parallel layer, columns of a row-parallel
one, its experts, its band of a merged projection, all of a norm). Each copy is a box of the checkpoint tensor
at fixed strides in a live parameter; neighbours become one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from apollo_ipc.manifest import Piece, Pieces, Refusal
from apollo_router.views import (
    IN_ANOTHER_ORDER,
    INTO_A_BUFFER,
    Copy,
    Recording,
    contiguous_stride,
    placed,
    product,
)


def derive_pieces(
    recording: Recording, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Pieces], list[Refusal]]:
    """Checkpoint name -> the boxes of it that `parameters` hold; what `derive_views` is for a rank that is
    alone. A tensor of which this rank holds nothing appears neither here nor in the refusals."""
    found, refused = placed(recording, parameters, _pieces_of)
    return {name: pieces for name, pieces in found.items() if pieces.pieces}, refused


def without_changed(
    found: Mapping[str, Pieces], changed: Mapping[str, str]
) -> tuple[dict[str, Pieces], list[Refusal]]:
    """changed: vLLM's tensor -> what became of it after loading. A checkpoint tensor with a piece there is
    refused whole: the other pieces alone would be trained."""
    kept, refused = {}, []
    for name, pieces in found.items():
        reasons = [changed[piece.tensor] for piece in pieces.pieces if piece.tensor in changed]
        if reasons:
            refused.append(Refusal(name, reasons[0], blocks=False))
        else:
            kept[name] = pieces
    return kept, refused


def _pieces_of(
    shape: tuple[int, ...],
    copies: list[Copy],
    by_storage: Mapping[int, str],
    parameters: Mapping[str, nn.Parameter],
) -> Pieces | str:
    pieces = []
    for copy in dict.fromkeys(copies):  # the same part loaded twice counts once
        if not product(copy.shape):  # a rank that has padding only
            continue
        if (tensor := by_storage.get(copy.dst_storage)) is None:
            return INTO_A_BUFFER
        if (box := _box(shape, copy)) is None:
            return IN_ANOTHER_ORDER
        offset = copy.dst_offset - int(parameters[tensor].storage_offset())
        pieces.append(Piece(tensor, *box, offset))
    return Pieces(list(shape), joined(pieces))


def _box(shape: tuple[int, ...], copy: Copy) -> tuple[list[int], list[int], list[int]] | None:
    """(start, size, stride in the live tensor) along each dimension; None where `copy` is no box."""
    source, start, rest = contiguous_stride(shape), [], copy.src_offset
    for step in source:
        index, rest = divmod(rest, step)
        start.append(index)
    size, stride = [1] * len(shape), [0] * len(shape)
    for left, src, dst in zip(copy.shape, copy.src_stride, copy.dst_stride, strict=True):
        if left == 1:
            continue
        dim = next((d for d in range(len(shape)) if source[d] == src and shape[d] > 1), None)
        if dim is None or size[dim] > 1:
            return None
        step = dst
        while left > shape[dim] - start[dim]:  # several of the checkpoint's dimensions, flattened
            if start[dim] or left % shape[dim] or dim == 0 or size[dim - 1] > 1:
                return None
            size[dim], stride[dim] = shape[dim], step if shape[dim] > 1 else 0
            left, step, dim = left // shape[dim], step * shape[dim], dim - 1
        size[dim], stride[dim] = left, step if left > 1 else 0
    return start, size, stride


def joined(pieces: list[Piece]) -> list[Piece]:
    """Boxes that lie behind each other in memory as they do in the checkpoint tensor become one."""
    done: list[Piece] = []
    for piece in sorted(pieces, key=lambda one: (one.tensor, one.start)):
        done.append(piece)
        while len(done) > 1 and (both := _join(done[-2], done[-1])) is not None:
            done[-2:] = [both]
    return done


def _join(a: Piece, b: Piece) -> Piece | None:
    dims = range(len(a.shape))
    moved = [d for d in dims if a.start[d] != b.start[d]]
    if a.tensor != b.tensor or len(moved) != 1:
        return None
    (dim,) = moved
    others = [d for d in dims if d != dim]
    if any((a.shape[d], a.stride[d]) != (b.shape[d], b.stride[d]) for d in others):
        return None
    step = a.stride[dim] or b.stride[dim] or b.offset - a.offset
    is_next = b.start[dim] == a.start[dim] + a.shape[dim] and b.offset == a.offset + step * a.shape[dim]
    if not is_next or step <= 0 or b.stride[dim] not in (0, step):
        return None
    shape, stride = list(a.shape), list(a.stride)
    shape[dim], stride[dim] = a.shape[dim] + b.shape[dim], step
    return Piece(a.tensor, a.start, shape, stride, a.offset)
