"""The kernels of cpu.py that update: moments, scales, and the writing, each over a range of rows or parts.

`update_bf16` and `update_fp32` are all of them, over a whole matrix, in one call. W, G and owed are (parts,
length of a part); scale is (rows, 1), or (1, cols) as (parts of a row, length of a part). R and G are fp32 or
the bits of bf16.
"""

# pyright: basic
# pyright: reportOperatorIssue=false, reportCallIssue=false
# (numba's intrinsics return numbers where they are called, functions where a type checker looks)

from __future__ import annotations

import numpy as np

from apollo_worker.optimizer.cpu_kernels import _SUM, F32, U32, _bits, _from_bits, _kernel, _mix, _value


@_kernel(fastmath=_SUM)
def row_squares(first, end, R_cr, out_c):
    for j in range(first, end):
        total = F32(0)
        for i in range(R_cr.shape[1]):
            R = _value(R_cr[j, i])
            total += R * R
        out_c[j] = total


@_kernel(fastmath=_SUM)
def update_moments(
    first, end, R_cr, m_cr, v_cr, beta1, rest1, beta2, rest2, correction1, correction2, eps, norm_U2
):
    for j in range(first, end):
        U2 = F32(0)
        for i in range(R_cr.shape[1]):
            R = _value(R_cr[j, i])
            m = m_cr[j, i] * beta1 + R * rest1
            v = v_cr[j, i] * beta2 + R * R * rest2
            m_cr[j, i], v_cr[j, i] = m, v
            U = (m / correction1) / (np.sqrt(v / correction2) + eps)
            U2 += U * U
        norm_U2[j] = U2


@_kernel()
def adam(G, m, v, beta1, rest1, beta2, rest2, correction1, correction2, eps, U):
    """update.adam_update, in its order of operations. U is written; m and v where all is finite. Was it?"""
    is_finite = True
    for i in range(len(U)):
        g = _value(G[i])
        v_new = v[i] * beta2 + g * g * rest2
        u = ((m[i] * beta1 + g * rest1) / correction1) / (np.sqrt(v_new / correction2) + eps)
        U[i] = u
        is_finite = is_finite and np.isfinite(v_new) and np.isfinite(u)
    if is_finite:
        for i in range(len(U)):
            g = _value(G[i])
            m[i] = m[i] * beta1 + g * rest1
            v[i] = v[i] * beta2 + g * g * rest2
    return is_finite


@_kernel()
def channel_scales(norm_R2, norm_U2, rank, alpha, eps, ratio, least, before, scale_c):
    """scale (c,) fp32 is written; returns |D|. update.channel_scales, update_norm and limit_growth, in fp64.

    ratio: 0 for no limit; least: `before`, the |D| of the step before, counts as at least that.
    """
    num = len(norm_R2)
    all_R2, all_U2, norm2 = 0.0, 0.0, 0.0
    for j in range(num):
        all_R2 += norm_R2[j]
        all_U2 += norm_U2[j]
    s = np.empty(num, np.float64)
    for j in range(num):
        R2, U2 = (np.float64(norm_R2[j]), np.float64(norm_U2[j])) if rank > 1 else (all_R2, all_U2)
        s[j] = alpha * np.sqrt(U2) / (np.sqrt(R2) + eps)
        norm2 += s[j] * s[j] * norm_R2[j]
    norm, largest = np.sqrt(norm2), ratio * max(before, least)
    shrink = largest / norm if ratio != 0 and norm > largest else 1.0
    for j in range(num):
        scale_c[j] = s[j] * shrink
    return norm * shrink


@_kernel(inline="always")
def _scale_of(scale, p, num_parts, filled):
    """The scales of part p, one for each of its elements; `filled` is memory for them."""
    if scale.shape[1] == len(filled):
        return scale[p % len(scale)]
    filled[:] = scale[p // (num_parts // len(scale)), 0]
    return filled


@_kernel(inline="always")
def _if_below_largest(moved, bits):
    """`moved` where the fp32 of `bits` is below bf16's largest, which rounding up then reaches at most; else
    `bits`: their upper half is that largest, or the infinity or NaN that was there."""
    return moved if U32(bits & U32(0x7FFFFFFF)) < U32(0x7F7F0000) else bits


@_kernel(inline="always")
def _to_nearest(bits):
    """fp32's bits rounded to bf16's, ties to even; finite stays finite, infinity and NaN what they are."""
    rounded = U32(bits + U32(0x7FFF) + U32(U32(bits >> U32(16)) & U32(1)))
    return U32(_if_below_largest(rounded, bits) & U32(0xFFFF0000))


@_kernel()
def write_fp32(first, end, W, G, owed, scale, neg_lr, weight_decay, key1, key2):
    filled = np.empty(W.shape[1], np.float32)
    for p in range(first, end):
        W_part, G_part, s = W[p], G[p], _scale_of(scale, p, len(W), filled)
        for i in range(len(filled)):
            w = W_part[i]
            W_part[i] = neg_lr * (G_part[i] * s[i] + weight_decay * w) + w


@_kernel()
def write_fp32_kahan(first, end, W, G, owed, scale, neg_lr, weight_decay, key1, key2):
    filled = np.empty(W.shape[1], np.float32)
    for p in range(first, end):
        W_part, G_part, owed_part, s = W[p], G[p], owed[p], _scale_of(scale, p, len(W), filled)
        for i in range(len(filled)):
            w = W_part[i]
            wanted = neg_lr * (G_part[i] * s[i] + weight_decay * w) + owed_part[i]
            rounded = w + wanted
            owed_part[i] = wanted - (rounded - w)
            W_part[i] = rounded


@_kernel()
def _write_bf16_stochastic(first, end, W, G, owed, scale, neg_lr, weight_decay, key1, key2):
    """rounding.stochastic_round with its random bits: a hash of 32 serves two neighbouring elements."""
    num = W.shape[1]
    filled, pairs = np.empty(num, np.float32), np.empty(num // 2 + 1, np.uint32)
    for p in range(first, end):
        offset = (p * num) % 2
        first_pair = U32((p * num) // 2)
        for i in range((offset + num + 1) // 2):
            pairs[i] = _mix(U32(_mix(U32(U32(first_pair + U32(i)) ^ key1)) ^ key2))
        random = pairs.view(np.uint16)[offset:]
        W_part, G_part, s = W[p], G[p], _scale_of(scale, p, len(W), filled)
        for i in range(num):
            w = _value(W_part[i])
            bits = _bits(neg_lr * (_value(G_part[i]) * s[i] + weight_decay * w) + w)
            moved = _if_below_largest(U32(bits + U32(random[i])), bits)
            W_part[i] = np.uint16(moved >> U32(16))


@_kernel()
def _write_bf16_nearest(first, end, W, G, owed, scale, neg_lr, weight_decay, key1, key2):
    filled = np.empty(W.shape[1], np.float32)
    for p in range(first, end):
        W_part, G_part, s = W[p], G[p], _scale_of(scale, p, len(W), filled)
        for i in range(len(filled)):
            w = _value(W_part[i])
            bits = _bits(neg_lr * (_value(G_part[i]) * s[i] + weight_decay * w) + w)
            W_part[i] = np.uint16(_to_nearest(bits) >> U32(16))


@_kernel()
def _write_bf16_kahan(first, end, W, G, owed, scale, neg_lr, weight_decay, key1, key2):
    """rounding.kahan_add; `owed` is the compensation, in bf16 like the weight."""
    filled = np.empty(W.shape[1], np.float32)
    for p in range(first, end):
        W_part, G_part, owed_part, s = W[p], G[p], owed[p], _scale_of(scale, p, len(W), filled)
        for i in range(len(filled)):
            w = _value(W_part[i])
            wanted = neg_lr * (_value(G_part[i]) * s[i] + weight_decay * w) + _value(owed_part[i])
            rounded = _to_nearest(_bits(w + wanted))
            left = wanted - (_from_bits(rounded) - w)
            W_part[i] = np.uint16(rounded >> U32(16))
            owed_part[i] = np.uint16(_to_nearest(_bits(left)) >> U32(16))


# The whole update of a matrix whose R is there. constants: beta1 to eps of update_moments; limits: alpha to
# before of channel_scales. Returns |D|, or -1 where R is not finite and nothing was changed.


@_kernel()
def _scales(R_cr, m_cr, v_cr, constants, limits, scale_c):
    num, rank = R_cr.shape
    norm_R2, norm_U2 = np.empty(num, np.float32), np.empty(num, np.float32)
    row_squares(0, num, R_cr, norm_R2)
    for j in range(num):
        if not np.isfinite(norm_R2[j]):
            return -1.0
    update_moments(0, num, R_cr, m_cr, v_cr, *constants, norm_U2)
    return channel_scales(norm_R2, norm_U2, rank, *limits, scale_c)


@_kernel()
def update_bf16(R, m, v, constants, limits, W, G, owed, scale, neg_lr, decay, key1, key2, rounding):
    norm = _scales(R, m, v, constants, limits, scale.reshape(scale.size))
    if norm >= 0:
        arguments = (W, G, owed, scale, neg_lr, decay, key1, key2)
        if rounding == 0:
            _write_bf16_stochastic(0, len(W), *arguments)
        elif rounding == 1:
            _write_bf16_nearest(0, len(W), *arguments)
        else:
            _write_bf16_kahan(0, len(W), *arguments)
    return norm


@_kernel()
def update_fp32(R, m, v, constants, limits, W, G, owed, scale, neg_lr, decay, key1, key2, rounding):
    norm = _scales(R, m, v, constants, limits, scale.reshape(scale.size))
    if norm >= 0:
        arguments = (W, G, owed, scale, neg_lr, decay, key1, key2)
        if rounding == 2:
            write_fp32_kahan(0, len(W), *arguments)
        else:
            write_fp32(0, len(W), *arguments)
    return norm


ROUNDINGS = {"stochastic": 0, "nearest": 1, "kahan": 2}

WRITE_BF16 = {
    "stochastic": _write_bf16_stochastic,
    "nearest": _write_bf16_nearest,
    "kahan": _write_bf16_kahan,
}
