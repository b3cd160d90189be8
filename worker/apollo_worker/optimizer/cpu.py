"""The update on a CPU: the gradient is read twice, the weight once and written once, by parts in the cache.

Compiled by numba, which vLLM needs anyway; machine code is kept in numba's cache, so that only the first
start waits for it. The kernels hold no interpreter lock and take ranges of rows, which threads share out.

Fast for bf16 and fp32 with rows that lie without gaps; all else goes to apollo_update.TorchBackend, which has
the same random bits and, without weight decay, the same results bit for bit where no sum is involved.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apollo_worker.optimizer import cpu_kernels as kernels
from apollo_worker.optimizer.cpu_kernels import F32, U32
from apollo_worker.optimizer.projection import BlockSign, Draw, Gaussian, Sketch
from apollo_worker.optimizer.rounding import hash_keys
from apollo_worker.optimizer.update import (
    CPU_PRODUCT_ELEMENTS,
    Hyper,
    State,
    TorchBackend,
    channels_first,
    new_state,
    project,
)

_MIN_PART_ELEMENTS = 2**18  # below this a second thread costs more than it saves
_SEGMENT = 1024  # of a weight's row: its scales and random bits, 6 KiB, stay in the first-level cache
_LANES = 8  # fp32 numbers in a vector of AVX2


class NumbaBackend:
    def __init__(self) -> None:
        self._plain = TorchBackend()
        self._threads = _Threads()
        self._scratch = torch.empty(CPU_PRODUCT_ELEMENTS)  # new memory costs more than what is computed in it
        self._has_bf16_units = has_bf16_units()

    def warm_up(self, dtype: torch.dtype, draw: Draw, hyper: Hyper) -> None:
        """By steps on small weights of its own. Some seconds once, then numba has the kernels on disk."""
        k, compensation = draw.rank, hyper.grid if hyper.rounding == "kahan" else None
        for shape in ((k + 1, k), (k, k + 1)):  # channels as rows, as columns
            weight = torch.zeros(shape, dtype=dtype)
            state = new_state(weight.shape, weight.device, rank=draw.rank, compensation=compensation)
            sketch = self.sketch(draw._replace(min_dim=k))
            self.apollo(weight, torch.zeros_like(weight), state, sketch, hyper)

    def apollo(self, weight: Tensor, grad: Tensor, state: State, sketch: Sketch, hyper: Hyper) -> Tensor:
        if not _is_fast(weight, grad, hyper):
            return self._plain.apollo(weight, grad, state, sketch, hyper)
        R_cr = self._project(grad, sketch)
        step = int(state["step"])
        corrections = F32(1 - hyper.beta1 ** (step + 1)), F32(1 - hyper.beta2 ** (step + 1))
        num_channels = len(R_cr)
        norm_R2 = np.empty(num_channels, F32)
        R, m, v = R_cr.numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()
        self._threads.share(kernels.row_squares, num_channels, R.size, R, norm_R2)
        if not np.isfinite(norm_R2).all():
            return torch.tensor(False)
        norm_U2 = np.empty(num_channels, F32)
        betas = F32(hyper.beta1), F32(1 - hyper.beta1), F32(hyper.beta2), F32(1 - hyper.beta2)
        moments = (R, m, v, *betas, *corrections, F32(hyper.eps), norm_U2)
        self._threads.share(kernels.update_moments, num_channels, R.size, *moments)
        scale, norm = self._scale(norm_R2, norm_U2, grad, state, hyper, is_tensor_wise=R.shape[1] == 1)
        state["update_norm"].fill_(norm)
        self._write(weight, grad, scale, state, hyper)
        state["step"] += 1
        return torch.tensor(True)

    def sketch(self, draw: Draw) -> Sketch:
        """The same as projection.make_sketch, up to the last bits of Gaussian's logarithms and cosines."""
        key1, key2 = (U32(key) for key in hash_keys(draw.derived_seed, int(draw.refresh_index)))
        min_dim, rank = draw.min_dim, draw.rank
        if draw.kind == "block_sign":
            bits = np.empty(min_dim, np.int32)
            kernels.hash(key1, key2, bits)
            shift_b = ((bits[::rank] >> 1) & 0x3FFFFFFF).astype(np.int64) % rank
            sign_k = (1 - 2 * (bits & 1)).astype(F32)
            return BlockSign(torch.from_numpy(shift_b), torch.from_numpy(sign_k), rank)
        num_pairs = (min_dim * rank + 1) // 2
        P = torch.empty(2 * num_pairs)
        arguments = key1, key2, F32(rank**-0.5), P.numpy()
        self._threads.share(kernels.normals, num_pairs, 32 * num_pairs, *arguments)
        return Gaussian(P[: min_dim * rank].view(min_dim, rank))

    def adam(self, weight: Tensor, grad: Tensor, state: State, hyper: Hyper) -> Tensor:
        return self._plain.adam(weight, grad, state, hyper)  # norms and biases: too small to matter

    def _project(self, grad: Tensor, sketch: Sketch) -> Tensor:
        if isinstance(sketch, Gaussian) and grad.dtype == torch.bfloat16 and self._has_bf16_units:
            # Exact products, sums in fp32; P and R are rounded, by 0.2 % of themselves in the mean: far below
            # what an estimate from r numbers is uncertain by. Two to three times as fast as in fp32.
            return (channels_first(grad) @ sketch.P_kr.bfloat16()).float()
        # Torch's product of matrices is the best there is; at low ranks it also beats sums of signs.
        if not isinstance(sketch, BlockSign) or sketch.rank < _LANES:
            return project(grad, sketch, self._scratch)
        rows, cols = grad.shape
        R_cr = torch.empty(max(rows, cols), sketch.rank)
        if rows >= cols:
            num_parts, kernel = rows, kernels.block_sign_tall
        else:
            num_parts, kernel = -(-cols // kernels.TILE_COLUMNS), kernels.block_sign_wide
        G, sign_k = _rows(grad), sketch.sign_k.numpy()
        if G.dtype == np.uint16:
            sign_k = (sign_k < 0).astype(np.uint16) << 15  # to be flipped
        self._threads.share(kernel, num_parts, grad.numel(), G, sketch.shift_b.numpy(), sign_k, R_cr.numpy())
        return R_cr

    def _scale(
        self, norm_R2: np.ndarray, norm_U2: np.ndarray, grad: Tensor, state: State, hyper: Hyper, *,
        is_tensor_wise: bool,
    ) -> tuple[np.ndarray, float]:  # fmt: skip
        """(s (c,) fp32, |D|), as channel_scales, update_norm and limit_growth of apollo_update, in fp64."""
        R2, U2 = norm_R2.astype(np.float64), norm_U2.astype(np.float64)
        size2 = R2
        if is_tensor_wise:
            U2, size2 = (np.full(len(R2), x.sum()) for x in (U2, R2))
        scale = hyper.alpha * np.sqrt(U2) / (np.sqrt(size2) + hyper.eps)
        norm = math.sqrt(float((scale * scale * R2).sum()))
        if hyper.limiter_ratio and int(state["step"]):
            floor = hyper.limiter_floor * math.sqrt(grad.numel())
            largest = hyper.limiter_ratio * max(float(state["update_norm"]), floor)
            if norm > largest:
                scale, norm = scale * (largest / norm), largest
        return scale.astype(F32), norm

    def _write(self, weight: Tensor, grad: Tensor, scale: np.ndarray, state: State, hyper: Hyper) -> None:
        rows, cols = weight.shape
        part = _part_length(cols)
        is_row_scale = len(scale) == rows
        owed = state.get("compensation", weight[:0])
        key1, key2 = hash_keys(hyper.rounding_seed, int(state["step"]))
        arguments = (
            *(_rows(tensor).reshape(-1, part) for tensor in (weight, grad, owed)),
            scale.reshape(-1, 1 if is_row_scale else part),
            *(F32(-hyper.lr), F32(hyper.weight_decay), U32(key1), U32(key2)),
        )
        if weight.dtype == torch.float32:
            kernel = kernels.write_fp32_kahan if hyper.rounding == "kahan" else kernels.write_fp32
        else:
            kernel = kernels.WRITE_BF16[hyper.rounding]
        self._threads.share(kernel, rows * cols // part, weight.numel(), *arguments)


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX), which torch's products then use."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


class _Threads:
    """As many as torch may use, made by the training thread: they inherit its scheduling class."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def share(self, kernel: Callable, num_rows: int, num_elements: int, *arguments: Any) -> None:
        """kernel(first row, end row, *arguments) over all rows, in parts, side by side."""
        num_parts = max(1, min(torch.get_num_threads(), num_rows, num_elements // _MIN_PART_ELEMENTS))
        ends = [num_rows * (i + 1) // num_parts for i in range(num_parts)]
        starts = [0, *ends[:-1]]
        if num_parts > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="apollo-step")
        waiting = [
            self._pool.submit(kernel, start, end, *arguments)
            for start, end in zip(starts[1:], ends[1:], strict=True)
            if self._pool
        ]
        kernel(0, ends[0], *arguments)
        for part in waiting:
            part.result()


def _is_fast(weight: Tensor, grad: Tensor, hyper: Hyper) -> bool:
    return (
        weight.dtype in (torch.bfloat16, torch.float32)
        and hyper.grid == weight.dtype == grad.dtype
        and weight.is_contiguous()
        and grad.is_contiguous()
        and weight.numel() > 0
    )


@functools.cache
def _part_length(cols: int) -> int:
    """Rows are written in equal parts of this length, prime rows whole."""
    if cols <= _SEGMENT:
        return cols
    return max((num for num in range(64, _SEGMENT + 1) if cols % num == 0), default=cols)


def _rows(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as numpy: fp32 as it is, bf16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
