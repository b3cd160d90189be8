"""The update on a CUDA device: the gradient is read twice, the weight once and written once.

Legend as in update.py: k = smaller dim, c = larger dim ("channels"), r = rank. One projected parameter
makes six launches; those that touch only c r or k r elements are short:

    normals         writes P (k, r) in the gradient's dtype, so that the product runs on tensor cores
    torch.mm        reads G and P, writes R (c, r) fp32
    channel_stats   reads R, m, v; writes each channel's scale, and of each program four sums
    verdict         one program: reads those sums; writes ok, the limiter's factor, step, update_norm
    store_moments   reads R, m, v; writes m, v
    write           reads G, W and the scales; writes W (with Kahan summation its leftovers, too)

A stack of experts makes as many: the expert is a dimension of each launch, and the product a batched one.

"block_sign" has hash_counters and signs in the place of normals. Its P of 0 and +-1 is exact in bf16, and on
tensor cores the product takes as long as reading G does. Adam is one launch, above _ADAM_ALONE elements 3.

Nothing waits for the device: only kernels look at step, ok and norms, and make the keys of the random bits.
Nothing is added atomically: a step can be repeated bit for bit. Without fused multiply-adds and with div_rn
and sqrt_rn the arithmetic is TorchBackend's up to the order of sums; the random bits are those of
rounding.py. With fp16 anywhere TorchBackend does the step.
"""

# pyright: reportPrivateUsage=false, reportMissingTypeStubs=false
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from apollo_worker.optimizer import gpu_kernels as kernels
from apollo_worker.optimizer.projection import Draw, Gaussian
from apollo_worker.optimizer.update import AtOnce, Hyper, State, TorchBackend, channels_first, project

_DTYPES = (torch.bfloat16, torch.float32)
_TILE = 4096  # elements of a program of 8 warps: 16 a thread, two loads of 16 bytes where they are bf16
_ROW_TILE = 1024  # of them along the contiguous dim: divides 5120 and 17408, so no lane is idle there
_ADAM_ALONE = 8192  # elements that one program takes: norms and biases of 5120 need a single launch
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}  # of every launch: Triton's own default changes

MakeP = Callable[[torch.dtype], Tensor]  # dtype -> P (k, r), made anew at each call


class TritonBackend(AtOnce):
    def __init__(self) -> None:
        self._plain = TorchBackend()
        # bf16 x bf16 -> fp32 is in torch from 2.8 on, and not on ROCm.
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        names = torch.ops.aten.mm.overloads()
        self._has_fp32_product = (
            torch.version.cuda is not None and "dtype" in names and has_kernel("aten::mm.dtype", "CUDA")
        )

    def warm_up(self, dtype: torch.dtype, draw: Draw | None, hyper: Hyper) -> None:
        """Nothing: Triton compiles anew for strides and sizes that are multiples of 16 and for those that are
        not, so a small step would compile other kernels than the real ones."""

    def sketch(self, draw: Draw) -> MakeP:
        """Later, since the gradient's dtype is not known here."""
        return functools.partial(_block_sign if draw.kind == "block_sign" else _gaussian, draw)

    def apollo(self, weight: Tensor, grad: Tensor, state: State, sketch: MakeP, hyper: Hyper) -> Tensor:
        with torch.cuda.device_of(weight):
            if not _is_fast(weight, grad, hyper):
                return self._plain.apollo(weight, grad, state, Gaussian(sketch(torch.float32)), hyper)
            R_cr = self._project(grad, sketch(grad.dtype))
            verdict = _scale(R_cr, grad.shape[-2] * grad.shape[-1], state, hyper)
            _write_weight(weight, grad, verdict, state, hyper)
            return _all_fine(verdict.fine)

    def adam(self, weight: Tensor, grad: Tensor, state: State, hyper: Hyper) -> Tensor:
        with torch.cuda.device_of(weight):
            is_simple = weight.dim() - state["step"].dim() <= 2 or weight.is_contiguous()
            if not (_is_fast(weight, grad, hyper) and is_simple and weight.numel() < 2**31):
                return self._plain.adam(weight, grad, state, hyper)
            return _adam_step(weight, grad, state, hyper)

    def _project(self, grad: Tensor, P_kr: Tensor) -> Tensor:
        """(c, r) fp32, or (E, c, r)."""
        G, product = channels_first(grad), torch.mm
        if grad.dim() == 3:
            P_kr, product = P_kr.expand(len(grad), *P_kr.shape), torch.bmm
        if grad.dtype == torch.float32:
            return product(G, P_kr)
        if self._has_fp32_product and grad.is_cuda:
            return product(G, P_kr, out_dtype=torch.float32)
        if grad.dim() == 2:
            return project(grad, Gaussian(P_kr.float()))
        return torch.stack([project(*one) for one in zip(grad, map(Gaussian, P_kr.float()), strict=True)])


def _is_fast(weight: Tensor, grad: Tensor, hyper: Hyper) -> bool:
    dtypes = (weight.dtype, grad.dtype, hyper.grid)
    return all(dtype in _DTYPES for dtype in dtypes) and weight.numel() > 0


def _gaussian(draw: Draw, dtype: torch.dtype) -> Tensor:
    size = draw.min_dim * draw.rank
    P_kr = torch.empty(draw.min_dim, draw.rank, dtype=dtype, device=draw.device)
    num_pairs = (size + 1) // 2
    seed = _halves(draw.derived_seed)
    kernels.normals[(triton.cdiv(num_pairs, 512),)](
        P_kr, draw.refresh_index, *seed, num_pairs, size, -2.0 / draw.rank, BLOCK=512, **_EXACT
    )
    return P_kr


def _block_sign(draw: Draw, dtype: torch.dtype) -> Tensor:
    k, rank = draw.min_dim, draw.rank
    P_kr = torch.empty(k, rank, dtype=dtype, device=draw.device)
    bits_k = torch.empty(k, dtype=torch.int32, device=draw.device)
    seed = _halves(draw.derived_seed)
    kernels.hash_counters[(triton.cdiv(k, 512),)](bits_k, draw.refresh_index, *seed, k, BLOCK=512, **_EXACT)
    block_r = triton.next_power_of_2(rank)
    block_k = max(1, _TILE // block_r)
    kernels.signs[(triton.cdiv(k, block_k),)](
        P_kr, bits_k, k, rank, BLOCK_K=block_k, BLOCK_R=block_r, **_EXACT
    )
    return P_kr


class _Verdict(NamedTuple):
    """Channel j of G is multiplied by scale_c[j] * factor where `ok`. Of each expert, where it is a stack."""

    ok: Tensor  # int8, as is the next
    fine: Tensor
    scale_c: Tensor
    factor: Tensor


def _all_fine(fine: Tensor) -> Tensor:
    return fine.view(torch.bool).all() if fine.dim() else fine.view(torch.bool)


def _flags(state: State) -> tuple[Tensor, Tensor]:
    """ok and fine, which are one where it is no stack."""
    ok = torch.empty(state["step"].shape, dtype=torch.int8, device=state["step"].device)
    return ok, torch.empty_like(ok) if ok.dim() else ok


def _scale(R_cr: Tensor, num_elements: int, state: State, hyper: Hyper) -> _Verdict:
    """num_elements: of one expert. Leaves in `state` what comes after the step, where ok."""
    *experts, num_channels, rank = R_cr.shape
    num_experts = math.prod(experts)
    block_r = triton.next_power_of_2(rank)
    block_c = max(1, _TILE // block_r)
    num_parts = triton.cdiv(num_channels, block_c)
    new = functools.partial(torch.empty, dtype=torch.float32, device=R_cr.device)
    scale_c, sums, factor = new(*experts, num_channels), new(*experts, 5, num_parts), new(experts)
    ok, fine = _flags(state)
    m, v, step, betas = state["exp_avg"], state["exp_avg_sq"], state["step"], _betas(hyper)
    rule = float(hyper.eps), float(hyper.alpha)
    kernels.channel_stats[(num_parts, num_experts)](
        R_cr, m, v, step, scale_c, sums, num_channels, *betas, *rule, **_logarithms(hyper),
        RANK=rank, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=8, **_EXACT,
    )  # fmt: skip
    floor = hyper.limiter_floor * math.sqrt(num_elements)
    kernels.verdict[(1, num_experts)](
        sums, num_parts, step, state["update_norm"], ok, fine, factor, *rule, float(hyper.limiter_ratio),
        floor, IS_TENSOR_WISE=rank == 1, IS_LIMITED=hyper.limiter_ratio > 0, IS_STACK=bool(experts),
        BLOCK=1024, **_EXACT,
    )  # fmt: skip
    size = num_channels * rank
    grid = (triton.cdiv(size, 1024), num_experts)
    kernels.store_moments[grid](R_cr, m, v, ok, size, *betas, BLOCK=1024, **_EXACT)
    return _Verdict(ok, fine, scale_c, factor)


def _write_weight(weight: Tensor, grad: Tensor, verdict: _Verdict, state: State, hyper: Hyper) -> None:
    """Counts on the step in `state` to be the one after the update, as verdict leaves it."""
    *experts, rows, cols = weight.shape
    tensors = (weight, grad, state.get("compensation", weight))
    indices, is_row_scale = (cols, 1), rows >= cols
    # "Inner" is the dim along which the weight lies in memory: the columns, or in a transposed view the rows.
    is_turned = weight.stride(-2) < weight.stride(-1)
    if is_turned:
        rows, cols = cols, rows
        tensors = tuple(tensor.mT for tensor in tensors)
        indices, is_row_scale = (1, indices[0]), not is_row_scale
    block_inner = min(_ROW_TILE, triton.next_power_of_2(cols))
    block_outer = _TILE // block_inner
    grid = (triton.cdiv(rows, block_outer) * triton.cdiv(cols, block_inner), math.prod(experts))
    strides = (stride for tensor in tensors for stride in _strides(tensor, 2))
    kernels.write[grid](
        *tensors, verdict.scale_c, verdict.factor, verdict.ok, state["step"], *_halves(hyper.rounding_seed),
        rows, cols, *strides, *indices, -float(hyper.lr), float(hyper.weight_decay), **_rounding(hyper),
        IS_OUTER_SCALE=is_row_scale, IS_PAIRED=cols % 2 == 0 and not is_turned, BLOCK_OUTER=block_outer,
        BLOCK_INNER=block_inner, num_warps=8, **_EXACT,
    )  # fmt: skip


def _adam_step(weight: Tensor, grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    num_dims = weight.dim() - state["step"].dim()
    shape, num_experts = weight.shape[weight.dim() - num_dims :], state["step"].numel()
    size = math.prod(shape)
    if num_dims > 2:
        grad = grad.contiguous()
    cols = shape[1] if num_dims == 2 else size
    block = min(_ADAM_ALONE, max(16, triton.next_power_of_2(size)))
    num_parts = triton.cdiv(size, block)
    if num_parts > 1:
        block, num_parts = _TILE, triton.cdiv(size, _TILE)
    ok, fine = _flags(state)
    bad = torch.empty(2, num_experts, num_parts, dtype=torch.int32, device=weight.device)
    m, v, owed = state["exp_avg"], state["exp_avg_sq"], state.get("compensation", weight)
    for phase in ("alone",) if num_parts == 1 else ("check", "write"):
        kernels.adam[(num_parts, num_experts)](
            weight, grad, m, v, owed, state["step"], bad, ok, fine, *_halves(hyper.rounding_seed), size,
            num_parts, cols, *_strides(weight, num_dims), *_strides(grad, num_dims), *_betas(hyper),
            float(hyper.eps), -float(hyper.lr), float(hyper.weight_decay), **_logarithms(hyper), PHASE=phase,
            **_rounding(hyper), IS_STACK=bool(ok.dim()), BLOCK=block,
            num_warps=max(1, min(16, block // 512)), **_EXACT,
        )  # fmt: skip
    if num_parts > 1:  # not in the kernel: its other programs may not have read the step yet
        state["step"] += ok
    return _all_fine(fine)


def _strides(tensor: Tensor, num_dims: int) -> tuple[int, int, int]:
    """From expert to expert, from row to row, along a row: of a vector and what lies contiguous, one row.
    num_dims: without the experts'."""
    expert = tensor.stride(0) if tensor.dim() > num_dims else 0
    own = tensor.stride()[tensor.dim() - num_dims :]
    row, col = own if num_dims == 2 else (0, own[0] if num_dims == 1 else 1)
    return expert, row, col


def _betas(hyper: Hyper) -> tuple[float, ...]:
    return float(hyper.beta1), 1.0 - hyper.beta1, float(hyper.beta2), 1.0 - hyper.beta2


def _rounding(hyper: Hyper) -> dict[str, Any]:
    return {"ROUNDING": hyper.rounding, "IS_BF16_GRID": hyper.grid == torch.bfloat16}


def _logarithms(hyper: Hyper) -> dict[str, float]:
    """Of the betas, to base 2. As constants, since arguments become fp32: too coarse for 1 - 0.999^t."""
    logs = [math.log2(beta) if beta else -math.inf for beta in (hyper.beta1, hyper.beta2)]
    return {"LOG_BETA1": logs[0], "LOG_BETA2": logs[1]}


def _halves(seed: int) -> tuple[int, int]:
    """A 64-bit seed as two int32, low half first: of greater numbers Triton would make another type."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return (low ^ 1 << 31) - (1 << 31), (high ^ 1 << 31) - (1 << 31)
