"""Writing an fp32 value into a low precision grid (bf16, fp16), and the random bits for it.

At |w| = 0.02 neighbouring bf16 values lie 1.2e-4 apart: round-to-nearest drops every smaller update, which
at a learning rate of 1e-5 is most of the learning. Stochastic rounding moves to the upper neighbour with
the probability that makes the expectation exact, and needs no memory; Kahan summation carries what was
dropped in a second buffer.

The random bits are a hash of (seed, step, element): no generator state to save, the same on every device,
and a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# fp32 has 23 mantissa bits; bf16 keeps 7 of them, fp16 keeps 10.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
_FP16_SMALLEST_NORMAL = 2.0**-14
_FP16_SUBNORMALS_PER_ONE = 2.0**24


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer, in place on int32 (products wrap, `& mask` makes shifts logical)."""
    h ^= (h >> 16) & 0xFFFF
    h *= -2048144789  # 0x85EBCA6B
    h ^= (h >> 13) & 0x7FFFF
    h *= -1028477387  # 0xC2B2AE35
    h ^= (h >> 16) & 0xFFFF
    return h


def _int32(value: int) -> int:
    """The low 32 bits of `value`, as a signed number."""
    return (value + 2**31) % 2**32 - 2**31


def hash_keys(seed: int, step: int) -> tuple[int, int]:
    """The two 32-bit keys that `hash_bits` makes of a seed and a step, as unsigned numbers, for kernels:
    bits(i) = mix(mix(i ^ key1) ^ key2)."""
    mask = 2**32 - 1

    def mix(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
        return h ^ (h >> 16)

    key = mix((step + 0x5BD1E995) & mask)
    key = mix(mix(key ^ (seed & mask)) ^ ((seed >> 32) & mask))
    return key, mix((key + 0x5BD1E995) & mask)


def hash_bits(num: int, seed: int, step: int | Tensor, *, first: int = 0, device: torch.device) -> Tensor:
    """32 random bits for each of the counters `first .. first + num - 1` (taken modulo 2^32).

    seed: 64 bits. step: an int, or a 0-dim integer tensor on `device` (then nothing waits for the device).
    Returns (num,) int32, bit for bit the same on every device.
    """
    if not isinstance(step, Tensor):
        step = torch.full((), _int32(step), dtype=torch.int32, device=device)
    key = _mix(step.to(torch.int32) + 0x5BD1E995)  # an odd constant, since _mix(0) is 0
    key = _mix(_mix(key ^ _int32(seed)) ^ _int32(seed >> 32))
    h = torch.arange(num, dtype=torch.int32, device=device)
    h += _int32(first)
    # Two rounds with two keys: after one, two steps would see the same numbers in another order.
    _mix(h.bitwise_xor_(key))
    return _mix(h.bitwise_xor_(_mix(key + 0x5BD1E995)))


def _hash_16(num: int, seed: int, step: int | Tensor, offset: int, device: torch.device) -> Tensor:
    """(num,) int32 in [0, 65536): each 32-bit hash serves two neighbouring elements."""
    first = offset // 2
    pairs = hash_bits((offset + num + 1) // 2 - first, seed, step, first=first, device=device)
    return pairs.view(torch.int16)[offset % 2 :][:num].to(torch.int32).bitwise_and_(0xFFFF)


def stochastic_round(x: Tensor, dtype: torch.dtype, seed: int, step: int | Tensor, offset: int = 0) -> Tensor:
    """`x` (fp32, any shape and stride) in `dtype`, up or down at random so that the mean is `x` itself.

    offset: flat index of x's first element in the whole tensor, so that a tensor may be rounded in parts.
    Values of the grid stay as they are, -0.0, infinities and NaN included; a finite value beyond the
    grid's largest becomes the largest (never infinite). dtype float32 gives `x` back.
    """
    if dtype == torch.float32:
        return x
    random = _hash_16(x.numel(), seed, step, offset, x.device).view(x.shape)
    dropped = _DROPPED_BITS[dtype]
    # In sign-magnitude bits, adding a number below 2^dropped carries into the kept bits with exactly the
    # probability (dropped part) / 2^dropped, also from one exponent to the next.
    bits = x.view(torch.int32) + (random & (2**dropped - 1))
    rounded = bits.bitwise_and_(-(2**dropped)).view(torch.float32)
    if dtype == torch.float16:  # below its smallest normal fp16's grid is even, fp32's is not
        u = (random & 0x1FFF).to(torch.float32).mul_(2.0**-13)
        steps = (x.abs() * _FP16_SUBNORMALS_PER_ONE).add_(u).floor_()
        subnormal = torch.copysign(steps.div_(_FP16_SUBNORMALS_PER_ONE), x)
        rounded = torch.where(x.abs() < _FP16_SMALLEST_NORMAL, subnormal, rounded)
    return _saturate(rounded, x, dtype)


def nearest_round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (fp32) in `dtype`, to the nearest (ties to even); a finite value stays finite."""
    return x if dtype == torch.float32 else _saturate(x, x, dtype)


def _saturate(rounded: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`rounded` in `dtype`, held inside its finite range; where `x` is not finite, `x`."""
    largest = torch.finfo(dtype).max
    return torch.where(torch.isfinite(x), rounded.clamp(-largest, largest), x).to(dtype)


def kahan_add(
    weight: Tensor, compensation: Tensor, update: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """weight + update on `dtype`'s grid, and what the rounding left over for the next time.

    weight, update: fp32; compensation: in `dtype`. Returns (weight, compensation), both in `dtype`.
    Kahan, "Further remarks on reducing truncation errors" (1965), as torchao.optim applies it to bf16.
    """
    owed = update + compensation.float()
    rounded = nearest_round(weight + owed, dtype)
    return rounded, nearest_round(owed - (rounded.float() - weight), dtype)


def grid_within(grid_dtype: torch.dtype, storage_dtype: torch.dtype) -> torch.dtype:
    """The grid to round to for a value that is stored in `storage_dtype` and saved in `grid_dtype`.

    vLLM keeps some bf16 parameters in fp32 (Qwen3.5's A_log): served and saved values must stay equal, so
    these are rounded to bf16 and stored in fp32. A grid finer than the storage cannot be kept.
    """
    return grid_dtype if storage_dtype == torch.float32 else storage_dtype
