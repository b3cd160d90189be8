"""The kernels of gpu.py, which says what each of them reads and writes.

Legend as in update.py: k = smaller dim, c = larger dim ("channels"), r = rank; pointers that end in a
shape are to contiguous memory, weights and gradients have any strides. Offsets are int64 where they may pass
2^31. step, ok and the like come as pointers, so that the host need not know them.

The second dimension of every launch that updates is the expert of a stack, 0 of other parameters: experts lie
one behind the other in what belongs to the optimizer, and weights, gradients and leftovers have a stride for
them. `fine` says that all was finite, `ok` that something was written: no expert without any gradient is.
"""

# pyright: basic

from typing import Any

import triton
import triton.language as tl

from apollo_worker.optimizer.gpu_rounding import (
    _hash,
    _is_finite,
    _nearest,
    _random_16,
    _stochastic,
    _uniform,
)

jit: Any = triton.jit  # whose types know no launch options and no int in the place of a constexpr
_SEEDS = ["seed_low", "seed_high"]  # Triton would compile anew for seeds that are 1 or a multiple of 16


# --- projections ---


@jit(do_not_specialize=_SEEDS)
def normals(P, refresh_index, seed_low, seed_high, num_pairs, size, radius2, BLOCK: tl.constexpr):
    """projection.projection: numbers i and i + num_pairs by Box-Muller from the hashes of both counters."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(refresh_index)
    u = _uniform(_hash(i.to(tl.uint32), seed_low, seed_high, index))
    angle = _uniform(_hash((i + num_pairs).to(tl.uint32), seed_low, seed_high, index)) * 6.283185307179586
    radius = tl.sqrt_rn(tl.log(u) * radius2)
    first, second = radius * tl.cos(angle), radius * tl.sin(angle)
    if P.dtype.element_ty == tl.bfloat16:
        first, second = _nearest(first), _nearest(second)
    tl.store(P + i, first.to(P.dtype.element_ty), mask=i < num_pairs)
    tl.store(P + num_pairs + i, second.to(P.dtype.element_ty), mask=i < size - num_pairs)


@jit(do_not_specialize=_SEEDS)
def hash_counters(bits_k, refresh_index, seed_low, seed_high, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = _hash(i.to(tl.uint32), seed_low, seed_high, tl.load(refresh_index))
    tl.store(bits_k + i, h.to(tl.int32), mask=i < size)


@jit
def signs(P, bits, k, RANK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """BlockSign.dense of hashed bits."""
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_R)
    first = row // RANK * RANK  # whose bits hold the shift of all of its block
    shift = ((tl.load(bits + first, mask=row < k, other=0) >> 1) & 0x3FFFFFFF) % RANK
    sign = 1.0 - 2.0 * (tl.load(bits + row, mask=row < k, other=0) & 1).to(tl.float32)
    value = tl.where(column[None, :] == ((row + shift) % RANK)[:, None], sign[:, None], 0.0)
    inside = (row < k)[:, None] & (column < RANK)[None, :]
    tl.store(P + row[:, None] * RANK + column[None, :], value.to(P.dtype.element_ty), mask=inside)


# --- moments and scales ---


@jit
def _moments(R, m, v, beta1, rest1, beta2, rest2):
    return m * beta1 + R * rest1, v * beta2 + R * R * rest2


@jit
def _direction(m, v, step, eps, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr):
    """U. The corrections 1 - beta^(step + 1) in fp64: in fp32 1 - 0.999 has an error of 6e-5."""
    t = (step + 1).to(tl.float64)
    correction1 = (1.0 - tl.exp2(t * tl.full((), LOG_BETA1, tl.float64))).to(tl.float32)
    correction2 = (1.0 - tl.exp2(t * tl.full((), LOG_BETA2, tl.float64))).to(tl.float32)
    vhat = tl.div_rn(v, correction2 + tl.zeros_like(v))
    mhat = tl.div_rn(m, correction1 + tl.zeros_like(m))
    return tl.div_rn(mhat, tl.sqrt_rn(vhat) + eps)


@jit
def _scales(U2, R2, eps, alpha):
    """update.channel_scales, from sums."""
    return tl.div_rn(alpha * tl.sqrt_rn(U2), tl.sqrt_rn(R2) + eps)


@jit
def channel_stats(
    R_cr, m_cr, v_cr, step, scale_c, sums, num_channels, beta1, rest1, beta2, rest2, eps, alpha,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, RANK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sums (E, 5, programs): of channels that are not finite, |D|^2 (at rank 1 unscaled), |U|^2, |R|^2, of
    channels with a gradient."""
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    expert = tl.program_id(1).to(tl.int64)
    R_cr += expert * num_channels * RANK
    m_cr += expert * num_channels * RANK
    v_cr += expert * num_channels * RANK
    step += expert
    scale_c += expert * num_channels
    sums += expert * 5 * num_parts
    channel = part * BLOCK_C + tl.arange(0, BLOCK_C)
    here, column = channel < num_channels, tl.arange(0, BLOCK_R)
    inside = here[:, None] & (column < RANK)[None, :]
    at = channel[:, None].to(tl.int64) * RANK + column[None, :]
    R = tl.load(R_cr + at, mask=inside, other=0.0)
    m, v = tl.load(m_cr + at, mask=inside, other=0.0), tl.load(v_cr + at, mask=inside, other=0.0)
    m, v = _moments(R, m, v, beta1, rest1, beta2, rest2)
    U = _direction(m, v, tl.load(step), eps, LOG_BETA1, LOG_BETA2)
    R2, U2 = tl.sum(R * R, 1), tl.sum(U * U, 1)
    # Also a finite gradient may be too large: squares that overflow would make v infinite for ever.
    is_finite = _is_finite(R2) & (tl.sum(_is_finite(v).to(tl.int32), 1) == BLOCK_R)
    scale = tl.full((BLOCK_C,), 1.0, tl.float32)
    if RANK > 1:
        scale = _scales(U2, R2, eps, alpha)
    tl.store(scale_c + channel, scale, mask=here)
    D = scale * tl.sqrt_rn(R2)
    tl.store(sums + part, tl.sum((is_finite == 0).to(tl.float32), 0))
    tl.store(sums + num_parts + part, tl.sum(D * D, 0))
    tl.store(sums + 2 * num_parts + part, tl.sum(U2, 0))
    tl.store(sums + 3 * num_parts + part, tl.sum(R2, 0))
    tl.store(sums + 4 * num_parts + part, tl.sum(tl.where(R2 == 0, 0.0, 1.0), 0))


@jit
def _total(sums, num_parts, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for first in range(0, num_parts, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(sums + i, mask=i < num_parts, other=0)
    return tl.sum(total, 0)


@jit
def verdict(
    sums, num_parts, step, update_norm, ok, fine, factor, eps, alpha, ratio, floor,
    IS_TENSOR_WISE: tl.constexpr, IS_LIMITED: tl.constexpr, IS_STACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """update.limit_growth, whether anything is written, and the scalars of the state."""
    expert = tl.program_id(1)
    sums += expert * 5 * num_parts
    step += expert
    update_norm += expert
    ok += expert
    fine += expert
    factor += expert
    previous, t = tl.load(update_norm), tl.load(step)  # by all warps, before one writes them
    num_bad = _total(sums, num_parts, BLOCK)
    norm = tl.sqrt_rn(_total(sums + num_parts, num_parts, BLOCK))
    by = tl.full((), 1.0, tl.float32)
    if IS_TENSOR_WISE:
        U2 = _total(sums + 2 * num_parts, num_parts, BLOCK)
        R2 = _total(sums + 3 * num_parts, num_parts, BLOCK)
        by = _scales(U2, R2, eps, alpha)
        norm *= by
    if IS_LIMITED:
        largest = tl.where(t == 0, norm, ratio * tl.maximum(previous, floor))
        shrink = tl.where(norm > largest, tl.div_rn(largest, norm), 1.0)
        by *= shrink
        norm *= shrink
    is_good = (num_bad == 0) & _is_finite(norm)
    if IS_STACK:
        tl.store(fine, is_good.to(tl.int8))
        is_good = is_good & (_total(sums + 4 * num_parts, num_parts, BLOCK) > 0)
    tl.store(ok, is_good.to(tl.int8))
    tl.store(factor, by)
    tl.store(update_norm, tl.where(is_good, norm, previous))
    tl.store(step, t + is_good.to(tl.int64))


@jit
def store_moments(R_cr, m_cr, v_cr, ok, size, beta1, rest1, beta2, rest2, BLOCK: tl.constexpr):
    """size: of an expert."""
    expert = tl.program_id(1).to(tl.int64)
    R_cr += expert * size
    m_cr += expert * size
    v_cr += expert * size
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size * tl.load(ok + expert)
    R = tl.load(R_cr + i, mask=inside, other=0.0)
    m, v = tl.load(m_cr + i, mask=inside, other=0.0), tl.load(v_cr + i, mask=inside, other=0.0)
    m, v = _moments(R, m, v, beta1, rest1, beta2, rest2)
    tl.store(m_cr + i, m, mask=inside)
    tl.store(v_cr + i, v, mask=inside)


# --- writing: update.write ---


@jit
def _store_rounded(
    W, change, at, owed, owed_at, random, inside, ROUNDING: tl.constexpr, IS_BF16_GRID: tl.constexpr
):
    """Writes W + change at the pointers `at`: stochastic_round, nearest_round or kahan_add of rounding.py."""
    total = change
    if ROUNDING == "kahan":
        total += tl.load(owed + owed_at, mask=inside, other=0.0).to(tl.float32)
    x = W + total
    if IS_BF16_GRID:
        x = _stochastic(x, random) if ROUNDING == "stochastic" else _nearest(x)
    if ROUNDING == "kahan":
        left = total - (x - W)
        if IS_BF16_GRID:
            left = _nearest(left)
        tl.store(owed + owed_at, left.to(owed.dtype.element_ty), mask=inside)
    tl.store(at, x.to(at.dtype.element_ty), mask=inside)


@jit(do_not_specialize=_SEEDS)
def write(
    weight, grad, owed, scale_c, factor, ok, step, seed_low, seed_high, num_outer, num_inner,
    weight_expert, weight_outer, weight_inner, grad_expert, grad_outer, grad_inner, owed_expert, owed_outer,
    owed_inner, index_outer, index_inner,
    neg_lr, weight_decay, ROUNDING: tl.constexpr, IS_BF16_GRID: tl.constexpr, IS_OUTER_SCALE: tl.constexpr,
    IS_PAIRED: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """W <- round(W - lr * (scale * factor * G + weight_decay * W)) where ok; `step` has counted this one.

    index: of an element in logical row-major order, which its random bits are drawn by.
    """
    expert = tl.program_id(1).to(tl.int64)
    weight += expert * weight_expert
    grad += expert * grad_expert
    owed += expert * owed_expert
    factor += expert
    ok += expert
    step += expert
    seed_low = seed_low ^ tl.program_id(1)
    num_tiles = tl.cdiv(num_inner, BLOCK_INNER)
    outer = (tl.program_id(0) // num_tiles) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
    first_inner = (tl.program_id(0) % num_tiles) * BLOCK_INNER
    inner = first_inner + tl.arange(0, BLOCK_INNER)
    inside = (outer < num_outer * tl.load(ok))[:, None] & (inner < num_inner)[None, :]
    row, col = outer[:, None].to(tl.int64), inner[None, :].to(tl.int64)
    at = weight + row * weight_outer + col * weight_inner
    W = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    G = tl.load(grad + row * grad_outer + col * grad_inner, mask=inside, other=0.0).to(tl.float32)
    if IS_OUTER_SCALE:
        scale_c += expert * num_outer
        scale = tl.load(scale_c + outer, mask=outer < num_outer, other=0.0)[:, None]
    else:
        scale_c += expert * num_inner
        scale = tl.load(scale_c + inner, mask=inner < num_inner, other=0.0)[None, :]
    change = (G * (scale * tl.load(factor)) + W * weight_decay) * neg_lr
    random = 0
    if ROUNDING == "stochastic" and IS_BF16_GRID:
        before = tl.load(step) - 1
        if IS_PAIRED:  # rows of even length: half the hashes, which cost more than the bytes do otherwise
            pair = (first_inner // 2 + tl.arange(0, BLOCK_INNER // 2)).to(tl.uint32)[None, :]
            h = _hash(((row * index_outer) >> 1).to(tl.uint32) + pair, seed_low, seed_high, before)
            random = tl.interleave(h & 0xFFFF, h >> 16)
        else:
            random = _random_16(row * index_outer + col * index_inner, seed_low, seed_high, before)
    owed_at = row * owed_outer + col * owed_inner
    _store_rounded(W, change, at, owed, owed_at, random, inside, ROUNDING, IS_BF16_GRID)


@jit(do_not_specialize=_SEEDS)
def adam(
    weight, grad, m, v, owed, step, bad, ok, fine, seed_low, seed_high, size, num_parts, cols,
    weight_expert, weight_row, weight_col, grad_expert, grad_row, grad_col, beta1, rest1, beta2, rest2, eps,
    neg_lr, weight_decay, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, PHASE: tl.constexpr,
    ROUNDING: tl.constexpr, IS_BF16_GRID: tl.constexpr, IS_STACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PHASE "check" counts in `bad` (2, E, programs) what is not finite and what gradient is not 0, "write"
    updates if the first is nothing; "alone", with one program, does both and counts the step. size: of an
    expert."""
    part = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    weight += expert * weight_expert
    grad += expert * grad_expert
    owed += expert * size
    m += expert * size
    v += expert * size
    step += expert
    bad += expert * num_parts
    asked = bad + tl.num_programs(1) * num_parts
    ok += expert
    fine += expert
    seed_low = seed_low ^ tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    row, col = (i // cols).to(tl.int64), (i % cols).to(tl.int64)
    G = tl.load(grad + row * grad_row + col * grad_col, mask=inside, other=0.0).to(tl.float32)
    m_new = tl.load(m + i, mask=inside, other=0.0)
    v_new = tl.load(v + i, mask=inside, other=0.0)
    m_new, v_new = _moments(G, m_new, v_new, beta1, rest1, beta2, rest2)
    before = tl.load(step)
    U = _direction(m_new, v_new, before, eps, LOG_BETA1, LOG_BETA2)
    num_asked = 1
    if PHASE == "write":
        num_bad = _total(bad, num_parts, 512)
        if IS_STACK:
            num_asked = _total(asked, num_parts, 512)
    else:
        is_finite = _is_finite(v_new) & _is_finite(U)
        num_bad = tl.sum((is_finite == 0).to(tl.int32), 0)
        if IS_STACK:
            num_asked = tl.sum((G != 0).to(tl.int32), 0)
    if PHASE == "check":
        tl.store(bad + part, num_bad)
        if IS_STACK:
            tl.store(asked + part, num_asked)
    else:
        is_good = tl.where(num_bad == 0, 1, 0)
        if IS_STACK:
            tl.store(fine, is_good)
            is_good = tl.where(num_asked != 0, is_good, 0)
        inside = i < size * is_good
        at = weight + row * weight_row + col * weight_col
        W = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        random = _random_16(i, seed_low, seed_high, before)
        change = (U + W * weight_decay) * neg_lr
        _store_rounded(W, change, at, owed, i, random, inside, ROUNDING, IS_BF16_GRID)
        tl.store(m + i, m_new, mask=inside)
        tl.store(v + i, v_new, mask=inside)
        tl.store(ok, is_good)
        if PHASE == "alone":
            tl.store(step, before + is_good)
