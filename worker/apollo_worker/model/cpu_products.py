"""Products of bf16 matrices on a CPU for which torch has no kernels of them.

oneDNN's need AVX512. Below it torch takes plain loops: 4 to 30 times as long as fp32's product, conversions
included (docs/log.md, 2026-11-27). So operands become fp32, a block at a time that fits a core's cache; sums
are fp32 and the result is rounded once, as by a CPU that has the instructions.

Legend: m, k, n: (m, k) times (k, n).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**18  # of an operand, as fp32 at one time: 1 MB
_installed: list[torch.library.Library] = []


def has_bf16_products() -> bool:
    """Whether torch multiplies bf16 by oneDNN on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX), which torch's products then use."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def convert_where_needed() -> None:
    """From here on, all of this process's products of bf16 on its CPU, backward passes too. Where torch has
    kernels, nothing is changed."""
    if _installed or has_bf16_products():
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel", UserWarning)
        for name, kernel in (("mm", mm), ("addmm", addmm), ("bmm", bmm)):
            library.impl(name, kernel, "CPU", allow_override=True)
    _installed.append(library)  # it ends with its object


# Overloads with `out` are operators of their own, which are torch's still.


def mm(a: Tensor, b: Tensor) -> Tensor:
    """(m, n), of a's dtype."""
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out) if a.dtype != torch.bfloat16 else _product(a, b, out)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * a b, rounded once; bias: broadcast to (m, n)."""
    if a.dtype != torch.bfloat16:
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
    if not has_bf16_products():
        return converted_bytes(m, k, n)
    # Without the instructions oneDNN sums in fp32 all of the result before it rounds it.
    return 0 if has_bf16_units() else 4 * m * n


def converted_bytes(*dimensions: int) -> int:
    """The same of our own products of these m, k and n."""
    short, middle, long = sorted(dimensions)
    step = min(long, max(1, BLOCK_ELEMENTS // max(1, middle)))
    return 4 * (short * middle + step * (short + middle))


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Into out (m, n), bf16 or fp32, along the longest dimension in blocks."""
    m, k, n = *a.shape, b.shape[1]
    step = max(1, BLOCK_ELEMENTS // max(1, sorted((m, k, n))[1]))
    if k >= max(m, n):
        total = torch.zeros(m, n)
        for at in range(0, k, step):
            some = slice(at, at + step)
            torch.addmm(total, a[:, some].float(), b[some].float(), out=total)
        return out.copy_(total)
    if m >= n:
        b = b.float()
        for at in range(0, m, step):
            some = slice(at, at + step)
            out[some] = torch.mm(a[some].float(), b, out=torch.empty(out[some].shape))
        return out
    a = a.float()
    for at in range(0, n, step):
        some = slice(at, at + step)
        out[:, some] = torch.mm(a, b[:, some].float(), out=torch.empty(out[:, some].shape))
    return out
