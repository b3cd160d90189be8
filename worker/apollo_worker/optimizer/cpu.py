"""The update on a CPU: the gradient is read twice, the weight once and written once, by parts in the cache.

Compiled by numba, which vLLM needs anyway; machine code is kept in numba's cache, so that only the first
start waits for it. The kernels hold no interpreter lock and take ranges of rows, which threads share out.

Waking a second thread takes about as long as a small matrix does. So small parameters wait for one another,
and threads that are woken once take them in turns, each a whole one; larger ones are shared out.

Fast for bf16 and fp32 with rows that lie without gaps; all else goes to update.TorchBackend, which has the
same random bits and, without weight decay, the same results bit for bit where no sum is involved.
"""

# pyright: basic
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from functools import partial
from threading import local
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apollo_ipc.cpu_products import has_bf16_units
from apollo_worker.optimizer import cpu_kernels as sketching
from apollo_worker.optimizer import cpu_write as kernels
from apollo_worker.optimizer.cpu_kernels import F32, U32
from apollo_worker.optimizer.cpu_threads import Threads
from apollo_worker.optimizer.projection import BlockSign, Draw, Gaussian, Sketch
from apollo_worker.optimizer.rounding import hash_keys
from apollo_worker.optimizer.update import (
    CPU_HELD_ELEMENTS,
    CPU_PRODUCT_ELEMENTS,
    Expert,
    Hyper,
    State,
    TorchBackend,
    Work,
    Written,
    channels_first,
    experts_of,
    new_state,
    project,
    states_of,
)

_SEGMENT = 1024  # of a weight's row: its scales and random bits, 6 KiB, stay in the first-level cache
_LANES = 8  # fp32 numbers in a vector of AVX2

Drawn = Callable[[torch.dtype], Sketch]  # of the gradient


class NumbaBackend:
    def __init__(self) -> None:
        self._plain = TorchBackend()
        self._threads = Threads()
        self._scratch = local()  # of each thread: new memory costs more than what is computed in it
        self._has_bf16_units = has_bf16_units()
        self._held: list[tuple[int, Work]] = []  # (number of elements, update)
        self._arrays: dict[int, _Arrays] = {}  # by the state's id
        self._experts: dict[int, tuple[State, list[State]]] = {}  # by the id of their stack's state
        self._kept: dict[tuple, tuple[int, Sketch]] = {}  # by parameter: (refresh index, sketch)

    def take(self, num_elements: int, update: Work) -> list[Written]:
        if num_elements > CPU_HELD_ELEMENTS:
            return [update()]
        self._held.append((num_elements, update))
        return self.flush() if sum(num for num, _ in self._held) > CPU_HELD_ELEMENTS else []

    def flush(self) -> list[Written]:
        held, self._held = self._held, []
        held.sort(key=lambda one: -one[0])  # the last ones are short: threads end together
        return self._threads.each([update for _, update in held])

    def drop(self) -> None:
        self._held = []

    def let_go(self, state: State) -> None:
        _, experts = self._experts.get(id(state), (state, []))
        for one in (state, *experts):
            self._arrays.pop(id(one), None)

    def warm_up(self, dtype: torch.dtype, draw: Draw | None, hyper: Hyper) -> None:
        """By steps on small weights of its own. Some seconds once, then numba has the kernels on disk."""
        compensation = hyper.grid if hyper.rounding == "kahan" else None
        if draw is None:
            weight = torch.zeros(8, dtype=dtype)
            state = new_state(weight.shape, weight.device, rank=None, compensation=compensation)
            self.adam(weight, torch.zeros_like(weight), state, hyper)
            return
        k = draw.rank
        for shape in ((k + 1, k), (k, k + 1)):  # channels as rows, as columns
            weight = torch.zeros(shape, dtype=dtype)
            state = new_state(weight.shape, weight.device, rank=draw.rank, compensation=compensation)
            sketch = partial(self._make_sketch, draw._replace(min_dim=k))
            for is_shared in (False, True):
                self._apollo(weight, torch.zeros_like(weight), state, sketch, hyper, is_shared=is_shared)

    def apollo(self, weight: Tensor, grad: Tensor, state: State, sketch: Drawn, hyper: Hyper) -> Written:
        if state["step"].dim():
            sketch(grad.dtype if _is_fast(weight, grad, hyper) else torch.float32)  # once, not in each thread
            return self._stack(partial(self.apollo, sketch=sketch), weight, grad, state, hyper)
        if not _is_fast(weight, grad, hyper):
            return self._plain.apollo(weight, grad, state, sketch(torch.float32), hyper)
        is_shared = self._threads.num_parts(max(grad.shape), grad.numel()) > 1
        return self._apollo(weight, grad, state, sketch, hyper, is_shared=is_shared)

    def _apollo(
        self, weight: Tensor, grad: Tensor, state: State, sketch: Drawn, hyper: Hyper, *, is_shared: bool
    ) -> bool:
        arrays, G = self._arrays_of(weight, state), _rows(grad)
        R, step = self._project(grad, G, sketch(grad.dtype)), int(arrays.step[0])
        limits = (
            *(hyper.alpha, hyper.eps, hyper.limiter_ratio if step else 0.0),
            *(hyper.limiter_floor * math.sqrt(G.size), float(arrays.update_norm[0])),
        )
        moments = R, arrays.exp_avg, arrays.exp_avg_sq, _constants(hyper, step)
        scale = np.empty(len(R), F32)
        to_write = _to_write(arrays, G, scale, hyper, _part_length(G.shape[1]))
        if not is_shared:
            update = kernels.update_fp32 if G.dtype == F32 else kernels.update_bf16
            norm = update(*moments, limits, *to_write, kernels.ROUNDINGS[hyper.rounding])
        else:
            norm = self._scales(*moments, limits, scale)
            if norm >= 0:
                self._write(to_write, hyper)
        if norm < 0:
            return False
        arrays.update_norm[0] = norm
        arrays.step[0] += 1
        return True

    def _stack(
        self, update: Callable[..., Written], weight: Tensor, grad: Tensor, state: State, hyper: Hyper
    ) -> bool:
        """Experts without any gradient are read, and that is all."""
        kept = self._experts.get(id(state))
        if kept is None or kept[0] is not state:
            kept = self._experts[id(state)] = state, states_of(state)

        def update_one(one: Expert) -> Written:
            return not one.grad.any() or update(one.weight, one.grad, state=one.state, hyper=one.hyper)

        work = [partial(update_one, one) for one in experts_of(weight, grad, kept[1], hyper)]
        is_small = weight.numel() <= CPU_HELD_ELEMENTS
        written = [one() for one in work] if is_small else self._threads.each(work)
        return all(written)

    def _scales(
        self, R: np.ndarray, m: np.ndarray, v: np.ndarray, constants: tuple, limits: tuple, scale: np.ndarray
    ) -> float:
        """kernels._scales by several threads."""
        norm_R2, norm_U2 = np.empty(len(R), F32), np.empty(len(R), F32)
        self._threads.share(kernels.row_squares, len(R), R.size, R, norm_R2)
        if not np.isfinite(norm_R2).all():
            return -1.0
        self._threads.share(kernels.update_moments, len(R), R.size, R, m, v, *constants, norm_U2)
        return kernels.channel_scales(norm_R2, norm_U2, R.shape[1], *limits, scale)

    def _arrays_of(self, weight: Tensor, state: State) -> _Arrays:
        """Made once: an operator of torch lets go of the interpreter's lock, and then waits for it."""
        kept = self._arrays.get(id(state))
        if kept is None or kept.state is not state or kept.address != weight.data_ptr():
            kept = self._arrays[id(state)] = _Arrays.of(weight, state)
        return kept

    def sketch(self, draw: Draw) -> Drawn:
        """Later, since the gradient's dtype is not known here. Kept until the next refresh: to make it anew
        takes a sixth of the time of a product with 1,536 channels."""
        return partial(self._kept_sketch, draw)

    def _kept_sketch(self, draw: Draw, dtype: torch.dtype) -> Sketch:
        index, key = int(draw.refresh_index), (draw.kind, draw.derived_seed, draw.min_dim, draw.rank, dtype)
        kept = self._kept.get(key)
        if kept is None or kept[0] != index:
            kept = self._kept[key] = index, self._make_sketch(draw, dtype)
        return kept[1]

    def _make_sketch(self, draw: Draw, dtype: torch.dtype) -> Sketch:
        """The same as projection.make_sketch, up to the last bits of Gaussian's logarithms and cosines; in
        bf16 where the product with a gradient of this dtype is made in it."""
        key1, key2 = (U32(key) for key in hash_keys(draw.derived_seed, int(draw.refresh_index)))
        min_dim, rank = draw.min_dim, draw.rank
        if draw.kind == "block_sign":
            bits = np.empty(min_dim, np.int32)
            sketching.hash(key1, key2, bits)
            shift_b = ((bits[::rank] >> 1) & 0x3FFFFFFF).astype(np.int64) % rank
            sign_k = (1 - 2 * (bits & 1)).astype(F32)
            return BlockSign(torch.from_numpy(shift_b), torch.from_numpy(sign_k), rank)
        num_pairs = (min_dim * rank + 1) // 2
        P = torch.empty(2 * num_pairs)
        arguments = key1, key2, F32(rank**-0.5), P.numpy()
        self._threads.share(sketching.normals, num_pairs, 32 * num_pairs, *arguments)
        P_kr = P[: min_dim * rank].view(min_dim, rank)
        return Gaussian(P_kr.bfloat16() if dtype == torch.bfloat16 and self._has_bf16_units else P_kr)

    def adam(self, weight: Tensor, grad: Tensor, state: State, hyper: Hyper) -> Written:
        if state["step"].dim():
            return self._stack(self.adam, weight, grad, state, hyper)
        if not _is_fast(weight, grad, hyper):
            return self._plain.adam(weight, grad, state, hyper)
        arrays, G = self._arrays_of(weight, state), _rows(grad.reshape(1, -1))
        U = np.empty(G.shape, F32)
        moments = arrays.exp_avg, arrays.exp_avg_sq, *_constants(hyper, int(arrays.step[0]))
        if not kernels.adam(G[0], *moments, U[0]):
            return False
        self._write(_to_write(arrays, U, np.ones(1, F32), hyper, _part_length(G.size)), hyper)
        arrays.step[0] += 1
        return True

    def _project(self, grad: Tensor, G: np.ndarray, sketch: Sketch) -> np.ndarray:
        """R (c, r), fp32 or the bits of bf16. G: grad's memory."""
        if isinstance(sketch, Gaussian) and sketch.P_kr.dtype == grad.dtype == torch.bfloat16:
            # Exact products, sums in fp32; P and R are rounded, by 0.2 % of themselves in the mean: far below
            # what an estimate from r numbers is uncertain by. Two to three times as fast as in fp32.
            return _rows(channels_first(grad) @ sketch.P_kr)
        # Torch's product of matrices is the best there is; at low ranks it also beats sums of signs.
        if not isinstance(sketch, BlockSign) or sketch.rank < _LANES:
            if not hasattr(self._scratch, "memory"):
                self._scratch.memory = torch.empty(CPU_PRODUCT_ELEMENTS)
            return project(grad, sketch, self._scratch.memory).numpy()
        rows, cols = G.shape
        R = np.empty((max(rows, cols), sketch.rank), F32)
        if rows >= cols:
            num_parts, kernel = rows, sketching.block_sign_tall
        else:
            num_parts, kernel = -(-cols // sketching.TILE_COLUMNS), sketching.block_sign_wide
        shift_b, sign_k = sketch.shift_b.numpy(), sketch.sign_k.numpy()
        if G.dtype == np.uint16:
            sign_k = (sign_k < 0).astype(np.uint16) << 15  # to be flipped
        self._threads.share(kernel, num_parts, G.size, G, shift_b, sign_k, R)
        return R

    def _write(self, arguments: tuple, hyper: Hyper) -> None:
        """arguments: of `_to_write`."""
        weight = arguments[0]
        if weight.dtype == F32:
            kernel = kernels.write_fp32_kahan if hyper.rounding == "kahan" else kernels.write_fp32
        else:
            kernel = kernels.WRITE_BF16[hyper.rounding]
        self._threads.share(kernel, len(weight), weight.size, *arguments)


class _Arrays(NamedTuple):
    """A parameter and its state as numpy: their memory, in which the kernels write."""

    state: State
    address: int
    weight: np.ndarray  # flat
    compensation: np.ndarray  # flat, empty where none is kept
    exp_avg: np.ndarray
    exp_avg_sq: np.ndarray
    step: np.ndarray  # (1,), as is the next
    update_norm: np.ndarray

    @staticmethod
    def of(weight: Tensor, state: State) -> _Arrays:
        flat, owed = weight.reshape(-1), state.get("compensation", weight.reshape(-1)[:0])
        moments = (
            state[key] if weight.dim() == 2 and "update_norm" in state else state[key].reshape(-1)
            for key in ("exp_avg", "exp_avg_sq")
        )
        counters = (state.get(key, torch.zeros(())).reshape(1) for key in ("step", "update_norm"))
        return _Arrays(
            state, weight.data_ptr(), _rows(flat), _rows(owed.reshape(-1)),
            *(tensor.numpy() for tensor in (*moments, *counters)),
        )  # fmt: skip


def _to_write(arrays: _Arrays, G: np.ndarray, scale: np.ndarray, hyper: Hyper, part: int) -> tuple:
    """What the writing kernels take after their range of parts. G: (rows, cols), the direction; scale: one
    number for each row, or for each column."""
    key1, key2 = hash_keys(hyper.rounding_seed, int(arrays.step[0]))
    return (
        *(array.reshape(-1, part) for array in (arrays.weight, G, arrays.compensation)),
        scale.reshape(-1, 1 if len(scale) == len(G) else part),
        *(F32(-hyper.lr), F32(hyper.weight_decay), U32(key1), U32(key2)),
    )


def kept_bytes(parameters: Iterable[Tensor], kind: str, rank: int) -> int:
    """What an optimizer of these projected ones keeps between steps beside their state: projections and
    memory in which a bf16 gradient is converted for a product in fp32."""
    num_bytes = num_converted = 0
    for parameter in parameters:
        k, is_bf16 = min(parameter.shape), parameter.dtype == torch.bfloat16
        if kind == "block_sign":
            num_bytes += 4 * k + 8 * -(-k // rank)
            is_converted = is_bf16 and rank < _LANES
        else:
            is_converted = is_bf16 and not has_bf16_units()
            num_bytes += k * rank * (2 if is_bf16 and not is_converted else 4)
        if is_converted:
            matrix = parameter.shape[-2] * parameter.shape[-1]
            num_converted = max(num_converted, min(CPU_PRODUCT_ELEMENTS, matrix))
    return num_bytes + 4 * num_converted * (torch.get_num_threads() + 1)


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


def _constants(hyper: Hyper, step: int) -> tuple:
    return _constants_of(hyper.beta1, hyper.beta2, hyper.eps, step)


@functools.lru_cache(16)  # all parameters' are the same
def _constants_of(beta1: float, beta2: float, eps: float, step: int) -> tuple:
    """The betas, what is missing of them to 1, eps last; before it the corrections of the moments' bias at
    step number `step` (from 0)."""
    corrections = (1 - beta ** (step + 1) for beta in (beta1, beta2))
    return tuple(F32(x) for x in (beta1, 1 - beta1, beta2, 1 - beta2, *corrections, eps))


def _rows(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as numpy: fp32 as it is, bf16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
