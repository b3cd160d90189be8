"""The manifests of several ranks, mapped: each checkpoint tensor as the pieces that they hold of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apollo_ipc.errors import AttachError
from apollo_ipc.manifest import Manifest, Piece, View
from apollo_worker.model.live_tensor import Part, Pieced
from apollo_worker.model.mapping import Transport, cut


def map_pieces(manifests: Sequence[Manifest], transports: Sequence[Transport]) -> dict[str, Pieced]:
    """Checkpoint tensor name -> its pieces, of all tensors that the ranks hold completely.

    A tensor that a rank refused is left out, and so is one of which a part is nowhere (`missing_parts` says
    why). Raises AttachError for pieces that contradict each other or reach outside of their memory.
    """
    shapes: dict[str, list[int]] = {}
    parts: dict[str, list[Part]] = {}
    boxes: dict[str, list[Piece]] = {}
    for manifest, transport in zip(manifests, transports, strict=True):
        segments = [transport.open(segment) for segment in manifest.segments]
        for name, held in manifest.pieces.items():
            if shapes.setdefault(name, held.shape) != held.shape:
                raise AttachError(f"{name}: the ranks give it two shapes", refused=[name])
            for piece in held.pieces:
                parts.setdefault(name, []).append(_part(name, piece, held.shape, manifest, segments))
                boxes.setdefault(name, []).append(piece)
    refused = {refusal.name for manifest in manifests for refusal in manifest.refused}
    for name, some in parts.items():
        if len({part.live.dtype for part in some}) > 1:
            raise AttachError(f"{name}: the ranks hold it in two dtypes", refused=[name])
    return {
        name: Pieced(shapes[name], some)
        for name, some in parts.items()
        if name not in refused and is_covered(shapes[name], boxes[name])
    }


def missing_parts(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Checkpoint tensor -> the reason why `map_pieces` left it out, of those that no rank refused."""
    boxes: dict[str, list[Piece]] = {}
    shapes: dict[str, list[int]] = {}
    for manifest in manifests:
        for name, held in manifest.pieces.items():
            shapes[name] = held.shape
            boxes.setdefault(name, []).extend(held.pieces)
    return {
        name: f"vLLM's {len(manifests)} ranks together hold only a part of it"
        for name, some in boxes.items()
        if not is_covered(shapes[name], some)
    }


def _part(
    name: str, piece: Piece, shape: list[int], manifest: Manifest, segments: list[torch.Tensor]
) -> Part:
    fits = len(piece.start) == len(piece.shape) == len(shape) and all(
        at >= 0 and at + size <= full for at, size, full in zip(piece.start, piece.shape, shape, strict=True)
    )
    if not fits:
        raise AttachError(f"{name}: a piece of rank {manifest.rank} lies outside of it", refused=[name])
    view = View(piece.tensor, piece.shape, piece.stride, piece.offset)
    stride = torch.empty(shape, device="meta").stride()
    offset = sum(at * step for at, step in zip(piece.start, stride, strict=True))
    return Part(cut(name, view, manifest, segments), stride, offset)


def is_covered(shape: Sequence[int], boxes: Sequence[Piece]) -> bool:
    """Whether the boxes together are all of it: looked at in the cells between their edges."""
    edges = [
        sorted({0, size} | {at for b in boxes for at in (b.start[dim], b.start[dim] + b.shape[dim])})
        for dim, size in enumerate(shape)
    ]
    if any(size == 0 for size in shape):
        return True
    cells = torch.zeros([len(some) - 1 for some in edges], dtype=torch.bool)
    for box in boxes:
        at = tuple(
            slice(some.index(box.start[dim]), some.index(box.start[dim] + box.shape[dim]))
            for dim, some in enumerate(edges)
        )
        cells[at] = True
    return bool(cells.all())
