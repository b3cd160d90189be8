"""Differences of tensors: exact for every pair of values, small for what training does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from apollo_ipc.checkpoint import delta
from apollo_ipc.checkpoint.shards import DTYPE_BYTES
from apollo_ipc.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3")


def frame_of(old: bytes, new: bytes, dtype: str) -> bytes:
    return b"".join(delta.encode(delta.pieces(old, dtype), delta.pieces(new, dtype), dtype))


def bf16(values: np.ndarray) -> bytes:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


@pytest.mark.parametrize("dtype", [*FLOATS, "I64", "U8", "BOOL"])
def test_a_difference_leads_there_and_back_for_any_bits(dtype):
    rng = np.random.default_rng(0)
    size = 3001 * DTYPE_BYTES[dtype]
    old, new = rng.bytes(size), rng.bytes(size)
    frame = frame_of(old, new, dtype)
    tensor = bytearray(old)
    delta.apply(frame, tensor, dtype)
    assert bytes(tensor) == new
    delta.apply(frame, tensor, dtype, is_reverse=True)
    assert bytes(tensor) == old


def test_every_bf16_value_can_become_every_special_one():
    """Zeros of both signs, subnormals, the largest finite, infinities, quiet and signalling NaNs."""
    special = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81], "u2")
    every = np.arange(65536, dtype="u2")
    for value in special:
        new = np.full_like(every, value)
        tensor = bytearray(every.tobytes())
        delta.apply(frame_of(every.tobytes(), new.tobytes(), "BF16"), tensor, "BF16")
        assert bytes(tensor) == new.tobytes()


def test_a_step_to_the_next_value_is_one_also_over_zero_and_over_an_exponent():
    values = [-1.0, -np.float32(2**-126), -0.0, 0.0, 0.99609375, 1.0]
    old = bf16(np.array(values))
    d = [int(x) for x in next(delta.changes(old, old, "BF16"))]
    assert d == [0] * len(values)
    bits = np.frombuffer(old, "i2")
    for a, b in itertools.pairwise([0x8001, 0x8000, 0x0000, 0x0001]):  # least negative ... least positive
        pair = [np.array([x], "u2").tobytes() for x in (a, b)]
        assert int(next(delta.changes(*pair, "BF16"))[0]) == 1
    assert int(next(delta.changes(old[8:10], old[10:12], "BF16"))[0]) == 1
    assert bits.size == len(values)


def test_a_tensor_of_many_pieces_and_an_empty_one(monkeypatch):
    monkeypatch.setattr(delta, "PIECE_ELEMENTS", 7)
    rng = np.random.default_rng(1)
    for num_elements in (0, 1, 6, 7, 8, 100):
        old, new = rng.bytes(2 * num_elements), rng.bytes(2 * num_elements)
        tensor = bytearray(old)
        delta.apply(frame_of(old, new, "BF16"), tensor, "BF16")
        assert bytes(tensor) == new


def test_what_training_changes_takes_a_small_part_of_the_bytes():
    """A quarter of the elements moved by one step: 0.25 * log2(4) + 0.75 * log2(4/3) + 0.25 bits = 1.06 of 16
    by Shannon, 6.6 %; zstd's Huffman codes of whole bits need more, and twice that is the bound here."""
    rng = np.random.default_rng(2)
    old = np.frombuffer(bf16(rng.standard_normal(400_000) * 0.02), "i2")
    new = old + rng.choice([-1, 0, 0, 0, 0, 0, 0, 1], old.size).astype("i2")
    assert len(frame_of(old.tobytes(), new.tobytes(), "BF16")) < 0.132 * old.nbytes


@pytest.mark.parametrize("change", [lambda f: f[:-4], lambda f: b"\0" + f[1:], lambda f: b""])
def test_a_damaged_difference_is_refused(change):
    old, new = b"\0" * 64, b"\1" * 64
    with pytest.raises(CheckpointError):
        delta.apply(change(frame_of(old, new, "BF16")), bytearray(old), "BF16")


def test_a_difference_of_a_larger_tensor_is_refused():
    with pytest.raises(CheckpointError, match="too long"):
        delta.apply(frame_of(b"\0" * 64, b"\1" * 64, "BF16"), bytearray(32), "BF16")
