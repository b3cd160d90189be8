"""Products of bf16 matrices on a CPU that has no instructions for them.

Without AVX512 torch takes plain loops: 4 to 30 times as long as fp32's product, conversions included
(docs/log.md, 2026-11-27). With AVX512 and without its bf16 instructions oneDNN takes 2 to 4 times as long
where no matrix is narrow (docs/log.md, 2026-11-28). So operands become fp32, a block at a time that fits a
core's cache; sums are fp32 and the result is rounded once, as by a CPU that has the instructions.

Legend: m, k, n: (m, k) times (k, n).
"""

from __future__ import annotations

import math
import threading
import warnings

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # of an operand, as fp32 at one time: 4 MB
NARROW = 16  # rows or columns: below it conversions cost as much as they save
_installed: list[torch.library.Library] = []


class _Scratch(threading.local):
    """A thread's buffers for conversions, fp32, BLOCK_ELEMENTS each, by slot."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}


_scratch = _Scratch()


def has_bf16_products() -> bool:
    """Whether torch multiplies bf16 by oneDNN on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX), which torch's products then use."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def convert_where_needed() -> None:
    """From here on, all of this process's products of bf16 on its CPU, backward passes too. Where the CPU
    has the instructions, nothing is changed."""
    if _installed or has_bf16_units():
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel", UserWarning)
        # Of batches oneDNN's are faster up to some 50 rows; attention, which has more, has its own kernels.
        for name, kernel in [("mm", mm), ("addmm", addmm), *([] if has_bf16_products() else [("bmm", bmm)])]:
            library.impl(name, kernel, "CPU", allow_override=True)
    _installed.append(library)  # it ends with its object


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """nn.functional.linear without gradients. x: (..., in), weight: (out, in), bias: (out,).

    A few rows, as while tokens are generated, go to torch: there a conversion of the weight does not pay.
    """
    # The compiler takes the whole forward pass or refuses it, and asks for no shapes.
    if torch.compiler.is_compiling() or has_bf16_units():
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.numel() // max(1, x.shape[-1])
    if rows < NARROW or not x.dtype == weight.dtype == torch.bfloat16:
        return torch.nn.functional.linear(x, weight, bias)
    x_rows, weight = x.reshape(rows, -1), weight.T
    out = mm(x_rows, weight) if bias is None else addmm(bias, x_rows, weight)
    return out.view(*x.shape[:-1], -1)


# Overloads with `out` are operators of their own, which are torch's still.


def mm(a: Tensor, b: Tensor) -> Tensor:
    """(m, n), of a's dtype."""
    out = a.new_empty(a.shape[0], b.shape[1])
    return _product(a, b, out) if _is_converted(a, b) else torch.mm(a, b, out=out)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * a b, rounded once; bias: broadcast to (m, n)."""
    if not _is_converted(a, b):
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))
    product = _product(a, b, torch.empty(a.shape[0], b.shape[1])).mul_(alpha)
    if beta != 0:  # else what is in it does not count, not even NaN
        product.add_(bias.float(), alpha=beta)
    return product.bfloat16()


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """(B, m, n)"""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if a.dtype != torch.bfloat16:
        return torch.bmm(a, b, out=out)
    step = max(1, BLOCK_ELEMENTS // max(1, a.shape[1:].numel(), b.shape[1:].numel()))
    for at in range(0, len(a), step):
        some = slice(at, at + step)
        out[some] = torch.bmm(a[some].float(), b[some].float(), out=torch.empty(out[some].shape))
    return out


def extra_bytes(m: int, k: int, n: int) -> int:
    """What a product of bf16 holds at one time beside its operands and its result, on this CPU."""
    if has_bf16_units():
        return 0
    if not _pays(m, k, n):
        return 4 * m * n  # oneDNN sums all of the result in fp32 before it rounds it
    short, middle, _ = sorted((m, k, n))
    return 4 * short * middle if short * middle > BLOCK_ELEMENTS else 0


def kept_bytes() -> int:
    """What a thread keeps of it between products, beside."""
    return 0 if has_bf16_units() else 3 * 4 * BLOCK_ELEMENTS


def _is_converted(a: Tensor, b: Tensor) -> bool:
    return a.dtype == torch.bfloat16 and _pays(a.shape[0], a.shape[1], b.shape[1])


def _pays(m: int, k: int, n: int) -> bool:
    return not has_bf16_products() or min(m, k, n) >= NARROW


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Into out (m, n), bf16 or fp32, along the longest dimension in blocks."""
    m, k, n = *a.shape, b.shape[1]
    step = max(1, BLOCK_ELEMENTS // max(1, sorted((m, k, n))[1]))
    if k >= max(m, n):
        total = _buffer(0, m, n).zero_()
        for at in range(0, k, step):
            some = slice(at, at + step)
            total.addmm_(_fp32(1, a[:, some]), _fp32(2, b[some]))
        return out.copy_(total)
    if m >= n:
        b = _fp32(0, b)
        for at in range(0, m, step):
            some = slice(at, at + step)
            out[some] = torch.mm(_fp32(1, a[some]), b, out=_buffer(2, *out[some].shape))
        return out
    a = _fp32(0, a)
    for at in range(0, n, step):
        some = slice(at, at + step)
        out[:, some] = torch.mm(a, _fp32(1, b[:, some]), out=_buffer(2, *out[:, some].shape))
    return out


def _fp32(slot: int, x: Tensor) -> Tensor:
    return _buffer(slot, *x.shape).copy_(x)


def _buffer(slot: int, *shape: int) -> Tensor:
    """fp32, until the slot's next use: new memory for each block would leave gaps in malloc's heap."""
    size = math.prod(shape)
    if size > BLOCK_ELEMENTS:
        return torch.empty(shape)
    buffer = _scratch.buffers.get(slot)
    if buffer is None or len(buffer) < size:
        with torch.inference_mode(False):  # what is made in it cannot be written outside of it
            buffer = _scratch.buffers[slot] = torch.empty(BLOCK_ELEMENTS)
    return buffer[:size].view(shape)
