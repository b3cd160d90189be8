"""The kernels of cpu.py that make sketches and project, over a range of rows or tiles: (first, end, ...).

bf16 comes as uint16: its bits are the upper half of fp32's. Indexes in loops run from 0 over whole rows: one
with an offset might be negative, and numba uses no vectors then.
"""

# pyright: basic
# pyright: reportOperatorIssue=false, reportCallIssue=false
# (numba's intrinsics return numbers where they are called, functions where a type checker looks)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

U32, F32 = np.uint32, np.float32
TILE_COLUMNS = 256  # of a wide gradient: its sums, 256 r of them, stay in the second-level cache
_SUM = {"reassoc", "contract"}  # what a vectorised sum needs; NaN and infinity stay what they are


def _kernel(**options: Any) -> Callable[[Callable], Callable]:
    def compile_later(function: Callable) -> Callable:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no directory for the cache can be written
            return njit(nogil=True, error_model="numpy", **options)(function)

    return compile_later


@intrinsic
def _value(typing_context, x):  # pyright: ignore[reportUnusedParameter]
    """uint16 bits of a bf16 -> its value in fp32; fp32 as it is. Two instructions, also in vector loops."""

    def generate(context, builder, signature, arguments):  # pyright: ignore[reportUnusedParameter]
        if x == types.float32:
            return arguments[0]
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(x), generate


@intrinsic
def _bits(typing_context, x):  # pyright: ignore[reportUnusedParameter]
    """The 32 bits of an fp32, as uint32."""

    def generate(context, builder, signature, arguments):  # pyright: ignore[reportUnusedParameter]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _from_bits(typing_context, x):  # pyright: ignore[reportUnusedParameter]
    def generate(context, builder, signature, arguments):  # pyright: ignore[reportUnusedParameter]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_kernel(inline="always")
def _mix(h):
    """rounding._mix. Each result is cut to 32 bits at once: numba's own integers are 64 wide."""
    h = U32(h ^ U32(h >> U32(16)))
    h = U32(h * U32(0x85EBCA6B))
    h = U32(h ^ U32(h >> U32(13)))
    h = U32(h * U32(0xC2B2AE35))
    return U32(h ^ U32(h >> U32(16)))


@_kernel()
def hash(key1, key2, out):
    for i in range(len(out)):
        out[i] = np.int32(_mix(U32(_mix(U32(U32(i) ^ key1)) ^ key2)))


@_kernel(fastmath={"contract"})
def normals(first, end, key1, key2, sigma, P):
    """projection.projection: normals i and i + pairs by Box-Muller, of the hashes of both counters.

    Logarithm, sine and cosine by the polynomials of Cephes (logf, sinf, cosf), right to fp32's last bit or
    two and, unlike the C library's, computed eight at a time.
    """
    num_pairs = len(P) // 2
    radius, angle = np.empty(end - first, np.float32), np.empty(end - first, np.uint32)
    bits = radius.view(np.uint32)
    for i in range(end - first):
        bits[i] = _mix(U32(_mix(U32(U32(first + i) ^ key1)) ^ key2))
        angle[i] = _mix(U32(_mix(U32(U32(first + i + num_pairs) ^ key1)) ^ key2))
    for i in range(end - first):
        radius[i] = F32(np.int32(bits[i] >> U32(8))) + F32(0.5)
    for i in range(end - first):
        # radius holds f = m 2^e, m in [1, 2): log(f 2^-24) = log(m) + (e - 24) log(2)
        e = np.int32(bits[i] >> U32(23)) - np.int32(127 + 24)
        m_bits = U32((bits[i] & U32(0x007FFFFF)) | U32(0x3F800000))
        is_high = m_bits > U32(0x3FB504F3)  # above sqrt(2): halved, so that |m - 1| is small
        bits[i] = U32(m_bits - U32(0x00800000)) if is_high else m_bits
        x = radius[i] - F32(1)
        exponent = F32(e + np.int32(1)) if is_high else F32(e)
        y = F32(7.0376836292e-2)
        y = y * x + F32(-1.1514610310e-1)
        y = y * x + F32(1.1676998740e-1)
        y = y * x + F32(-1.2420140846e-1)
        y = y * x + F32(1.4249322787e-1)
        y = y * x + F32(-1.6668057665e-1)
        y = y * x + F32(2.0000714765e-1)
        y = y * x + F32(-2.4999993993e-1)
        y = y * x + F32(3.3333331174e-1)
        log = x + (y * x * x * x - F32(0.5) * x * x) + exponent * F32(0.69314718056)
        radius[i] = sigma * np.sqrt(F32(-2) * log)
    for i in range(end - first):
        turns = (F32(np.int32(angle[i] >> U32(8))) + F32(0.5)) * F32(2.0**-22)  # in quarter turns, [0, 4)
        quarter = np.int32(turns + F32(0.5))
        t = (turns - F32(quarter)) * F32(1.57079632679)  # in [-pi/4, pi/4]
        z = t * t
        sine = ((F32(-1.9515295891e-4) * z + F32(8.3321608736e-3)) * z + F32(-1.6666654611e-1)) * z * t + t
        cosine = (F32(2.443315711809948e-5) * z + F32(-1.388731625493765e-3)) * z + F32(4.166664568298827e-2)
        cosine = cosine * z * z - F32(0.5) * z + F32(1)
        is_odd = (quarter & np.int32(1)) == np.int32(1)
        c, s = (sine, cosine) if is_odd else (cosine, sine)
        P[first + i] = -radius[i] * c if ((quarter + np.int32(1)) & np.int32(2)) else radius[i] * c
        P[num_pairs + first + i] = -radius[i] * s if (quarter & np.int32(2)) else radius[i] * s


@intrinsic
def _signed(typing_context, x, sign):  # pyright: ignore[reportUnusedParameter]
    """x * sign for fp32; for bf16's bits `sign` is 0x8000 or 0, and nothing is converted."""

    def generate(context, builder, signature, arguments):  # pyright: ignore[reportUnusedParameter]
        return builder.fmul(*arguments) if x == types.float32 else builder.xor(*arguments)

    return x(x, sign), generate


@_kernel(fastmath=_SUM)
def block_sign_tall(first, end, G, shift_b, sign_k, R_cr):
    """Channels are rows. Each block of a row is written twice in a row, with its signs: rotated, it is then r
    neighbours again. Four blocks are added at a time, since sums in memory cost more than additions."""
    k, r, num_blocks = G.shape[1], R_cr.shape[1], len(shift_b)
    num_padded = (num_blocks + 3) // 4 * 4
    shift = np.zeros(num_padded, np.int64)
    shift[:num_blocks] = shift_b
    twice = np.zeros(2 * r * num_padded, G.dtype)
    sums = np.empty(r, np.float32)
    for j in range(first, end):
        G_row = G[j]
        for b in range(num_blocks):
            block, sign = G_row[b * r : min((b + 1) * r, k)], sign_k[b * r : (b + 1) * r]
            once, again = twice[2 * b * r : (2 * b + 1) * r], twice[(2 * b + 1) * r : (2 * b + 2) * r]
            for i in range(len(block)):
                x = _signed(block[i], sign[i])
                once[i] = x
                again[i] = x
        for i in range(r):
            sums[i] = F32(0)
        for b in range(0, num_padded, 4):
            start = (2 * b + 1) * r
            x0 = twice[start - shift[b] : start - shift[b] + r]
            x1 = twice[start + 2 * r - shift[b + 1] : start + 3 * r - shift[b + 1]]
            x2 = twice[start + 4 * r - shift[b + 2] : start + 5 * r - shift[b + 2]]
            x3 = twice[start + 6 * r - shift[b + 3] : start + 7 * r - shift[b + 3]]
            for i in range(r):
                sums[i] += (_value(x0[i]) + _value(x1[i])) + (_value(x2[i]) + _value(x3[i]))
        R_row = R_cr[j]
        for i in range(r):
            R_row[i] = sums[i]


@_kernel(inline="always")
def _row_at(b, i, r, shift):
    """The row of block b that goes to column i."""
    return b * r + (i - shift if i >= shift else i - shift + r)


@_kernel(fastmath=_SUM)
def block_sign_wide(first, end, G, shift_b, sign_k, R_cr):
    """Channels are columns: a tile of them at a time, first and end count tiles. Four blocks at a time."""
    k, r = G.shape[0], R_cr.shape[1]
    num_fours = k // r // 4 * 4
    # Rows that lie a power of two apart share few sets of a cache, and are read across at the end.
    sums = np.empty((r, TILE_COLUMNS + 16), np.float32)
    for tile in range(first, end):
        start = tile * TILE_COLUMNS
        stop = min(start + TILE_COLUMNS, G.shape[1])
        sums[:] = F32(0)
        for b in range(0, num_fours, 4):
            for i in range(r):
                p0, p1 = _row_at(b, i, r, shift_b[b]), _row_at(b + 1, i, r, shift_b[b + 1])
                p2, p3 = _row_at(b + 2, i, r, shift_b[b + 2]), _row_at(b + 3, i, r, shift_b[b + 3])
                x0, x1, x2, x3 = G[p0][start:stop], G[p1][start:stop], G[p2][start:stop], G[p3][start:stop]
                sign0, sign1, sign2, sign3 = sign_k[p0], sign_k[p1], sign_k[p2], sign_k[p3]
                row = sums[i][: stop - start]
                for c in range(len(row)):
                    row[c] += (_value(_signed(x0[c], sign0)) + _value(_signed(x1[c], sign1))) + (
                        _value(_signed(x2[c], sign2)) + _value(_signed(x3[c], sign3))
                    )
        for p in range(num_fours * r, k):
            x0, sign0, row = G[p][start:stop], sign_k[p], sums[(p + shift_b[p // r]) % r][: stop - start]
            for c in range(len(row)):
                row[c] += _value(_signed(x0[c], sign0))
        for c in range(stop - start):
            R_row = R_cr[start + c]
            for i in range(r):
                R_row[i] = sums[i, c]
