"""Differences between two versions of a tensor, element by element, in steps of the dtype's own ordering.

Training at a small learning rate moves a bf16 weight by no or one step to its neighbour, and almost every
block of bytes changes nevertheless: so not bytes but elements are compared. For each element

    ordinal   its place among all values of its dtype in order (-0 next below +0): a bijection on the bits
    d         ordinal(new) - ordinal(old), modulo the width: exact for any two values, NaN included
    z         zigzag of d: 0, -1, 1, -2, 2, ... -> 0, 1, 2, 3, 4, ...

and the bytes of z are stored plane by plane (all lowest ones, then all next ones) in one zstd frame a tensor:
the lowest plane holds small numbers, the others almost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import zstandard

from apollo_ipc.checkpoint.shards import DTYPE_BYTES
from apollo_ipc.errors import CheckpointError

# Small enough for a core's cache, since several passes go over each piece. Part of the format: planes are
# laid out by pieces of this many elements.
PIECE_ELEMENTS = 256 * 1024
# Long matches only: on this data short ones cost twice the time and save nothing.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(  # pyright: ignore[reportUnknownMemberType]
    1, min_match=7
)


def encode(old: Iterator[np.ndarray], new: Iterator[np.ndarray], dtype: str) -> Iterator[bytes]:
    """The zstd frame that turns `old` into `new`, piece by piece.

    old, new: the bytes of the tensor as uint8 arrays, in pieces of PIECE_ELEMENTS elements (see `pieces`);
    dtype: safetensors' name.
    """
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compressobj()
    for a, b in zip(old, new, strict=True):
        if data := compressor.compress(_planes(_difference(a, b, dtype))):
            yield data
    yield compressor.flush()


def apply(
    frame: bytes | bytearray | memoryview, tensor: bytearray, dtype: str, *, is_reverse: bool = False
) -> None:
    """Turns the bytes of `tensor` into the other version, in place.

    Raises CheckpointError where `frame` is not the difference of a tensor of this size.
    """
    width, size = DTYPE_BYTES[dtype], len(tensor)
    view = np.frombuffer(tensor, np.uint8)
    with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
        try:
            for start in range(0, size, PIECE_ELEMENTS * width):
                piece = view[start : start + PIECE_ELEMENTS * width]
                data = reader.read(piece.size)
                if len(data) != piece.size:
                    raise CheckpointError("the difference ends too early")
                _add(piece, _unplanes(data, width), dtype, is_reverse)
            if reader.read(1):
                raise CheckpointError("the difference is too long")
        except zstandard.ZstdError as error:
            raise CheckpointError(f"not a difference: {error}") from error


def pieces(tensor: bytes | bytearray | memoryview | np.ndarray, dtype: str) -> Iterator[np.ndarray]:
    """The bytes of a whole tensor in the pieces that `encode` takes."""
    view = np.frombuffer(tensor, np.uint8)
    size = PIECE_ELEMENTS * DTYPE_BYTES[dtype]
    for start in range(0, view.size, size):
        yield view[start : start + size]


def changes(old: bytes | bytearray, new: bytes | bytearray, dtype: str) -> Iterator[np.ndarray]:
    """d of every element, piece by piece, as signed integers of the dtype's width."""
    for a, b in zip(pieces(old, dtype), pieces(new, dtype), strict=True):
        yield _unzigzag(_difference(a, b, dtype))


def _difference(old: np.ndarray, new: np.ndarray, dtype: str) -> np.ndarray:
    """z of each element, unsigned."""
    signed = _signed(dtype)
    d = _ordinal(new.view(signed), dtype)
    d -= _ordinal(old.view(signed), dtype)  # integers wrap
    return ((d << 1) ^ (d >> (signed.itemsize * 8 - 1))).view(_unsigned(dtype))


def _add(piece: np.ndarray, z: np.ndarray, dtype: str, is_reverse: bool) -> None:
    values = piece.view(_signed(dtype))
    ordinals, d = _ordinal(values, dtype), _unzigzag(z)
    # The ordinal of an ordinal is the value: it is its own inverse.
    values[:] = _ordinal(ordinals - d if is_reverse else ordinals + d, dtype)


def _ordinal(bits: np.ndarray, dtype: str) -> np.ndarray:
    """A copy. Negative floats lie in order of falling magnitude: all bits but the sign are turned."""
    if not dtype.startswith(("F", "BF")):
        return bits.copy()
    width = bits.dtype.itemsize * 8
    return bits ^ ((bits >> (width - 1)) & bits.dtype.type((1 << (width - 1)) - 1))


def _unzigzag(z: np.ndarray) -> np.ndarray:
    one = z.dtype.type(1)
    return ((z >> one) ^ (~(z & one) + one)).view(f"i{z.dtype.itemsize}")


def _planes(z: np.ndarray) -> memoryview:
    return np.ascontiguousarray(z.view(np.uint8).reshape(-1, z.dtype.itemsize).T).data.cast("B")


def _unplanes(data: bytes, width: int) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(width, -1)
    return np.ascontiguousarray(planes.T).view(f"u{width}").reshape(-1)


def _signed(dtype: str) -> np.dtype:
    return np.dtype(f"i{DTYPE_BYTES[dtype]}")


def _unsigned(dtype: str) -> np.dtype:
    return np.dtype(f"u{DTYPE_BYTES[dtype]}")
