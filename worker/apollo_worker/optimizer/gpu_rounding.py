"""What the kernels of gpu_kernels.py share: rounding.py's random bits and its two ways to bf16."""

# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl

jit: Any = triton.jit  # whose types know no launch options and no int in the place of a constexpr
_BF16_MAX: tl.constexpr = tl.constexpr(torch.finfo(torch.bfloat16).max)


# On uint32 products wrap and shifts are logical.


@jit
def _mix(h):
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@jit
def _hash(counter, seed_low, seed_high, step):
    """uint32 of uint32 counters; the keys are scalars, once a program."""
    key = _mix(step.to(tl.uint32) + 0x5BD1E995)
    key = _mix(_mix(key ^ seed_low.to(tl.uint32)) ^ seed_high.to(tl.uint32))
    return _mix(_mix(counter ^ key) ^ _mix(key + 0x5BD1E995))


@jit
def _uniform(bits):
    return ((bits >> 8).to(tl.float32) + 0.5) * (2.0**-24)


@jit
def _random_16(index, seed_low, seed_high, step):
    """A 32-bit hash serves two neighbours, the even one by its low half."""
    h = _hash((index >> 1).to(tl.uint32), seed_low, seed_high, step)
    return (h >> ((index & 1) * 16).to(tl.uint32)) & 0xFFFF


@jit
def _is_finite(x):
    return tl.abs(x) < float("inf")  # of NaN no comparison is true


@jit
def _saturate(bits, x):
    """The upper half of `bits` as fp32, held inside bf16's finite range; where x is not finite, x."""
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    rounded = tl.minimum(tl.maximum(rounded, -_BF16_MAX), _BF16_MAX)
    return tl.where(_is_finite(x), rounded, x)


@jit
def _nearest(x):
    bits = x.to(tl.uint32, bitcast=True)
    return _saturate(bits + 0x7FFF + ((bits >> 16) & 1), x)


@jit
def _stochastic(x, random):
    return _saturate(x.to(tl.uint32, bitcast=True) + random, x)
