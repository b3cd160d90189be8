"""The mathematics of APOLLO (arXiv:2412.05270) in plain torch: a step size per channel, from a projection.

Legend: k = smaller dim of a parameter, c = larger dim ("channels"), r = rank.
    R_cr = G_ck P_kr          G_ck: the gradient with its channels first (a view, never a copy)
    m_cr, v_cr                Adam's moments of R, fp32
    s_j = alpha |U_j| / (|R_j| + eps),  U = mhat / (sqrt(vhat) + eps),  alpha = sqrt(k / r)
    D = s * G,  |D| <= limiter_ratio * |D of the step before|
    W <- round(W - lr * (D + weight_decay * W))

A stack of E experts, G_eck, is E such parameters of one shape and one P, each with a step count, moments,
limiter and random bits of its own. An expert without any gradient was not asked: nothing of it changes.

`TorchBackend` runs on any device, dtype and stride: what the fast ones (cpu.py, gpu.py) are
held to by tests, and what they leave to it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportConstantRedefinition=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from apollo_worker.optimizer.projection import Draw, Sketch, dense, make_sketch
from apollo_worker.optimizer.rounding import kahan_add, nearest_round, stochastic_round

# Elements worked on at a time, so that fp32 temporaries stay small beside the weight: on a CPU in its
# cache, on a GPU 64 MiB each.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_DEVICE = 2**24
CPU_PRODUCT_ELEMENTS = 2**22  # of a product of matrices on a CPU: a smaller one does not fill two cores
CPU_HELD_ELEMENTS = (
    2**23
)  # of gradients that wait for one another on a CPU: 16 MiB in bf16; larger ones never

State = dict[str, Tensor]  # of one parameter: step, exp_avg, exp_avg_sq, update_norm, compensation


class Hyper(NamedTuple):
    """What one update is made with. limiter_ratio: 0 is off."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    alpha: float
    limiter_ratio: float
    limiter_floor: float  # root mean square of D, in units of lr, below which the limiter does not bite
    rounding: str
    rounding_seed: int  # of this parameter
    grid: torch.dtype  # what is written is rounded to


Drawn = TypeVar("Drawn")
Written = Tensor | bool
Asked = Tensor | bool  # whether an expert has any gradient
Work = Callable[[], Written]


class Backend(Protocol[Drawn]):
    """Updates one parameter in place, its state too. What is not finite changes nothing.

    `apollo` and `adam` say whether all was finite: a 0-dim bool tensor on the weight's device, which nothing
    has waited for, or a bool. What `sketch` makes of a draw is for the same backend's `apollo` alone. A
    parameter whose state's `step` is (E,) is a stack of experts.
    """

    def sketch(self, draw: Draw) -> Drawn: ...

    def apollo(self, weight: Tensor, grad: Tensor, state: State, sketch: Drawn, hyper: Hyper) -> Written: ...

    def adam(self, weight: Tensor, grad: Tensor, state: State, hyper: Hyper) -> Written: ...

    def take(self, num_elements: int, update: Work) -> list[Written]:
        """Runs `update`, which calls `apollo` or `adam`, or keeps it until there are more. num_elements: of
        the gradient that it holds. Returns what the updates returned that were run."""
        ...

    def flush(self) -> list[Written]:
        """Runs what was kept; returns what it returned."""
        ...

    def drop(self) -> None:
        """Forgets what was kept."""
        ...

    def let_go(self, state: State) -> None:
        """Of the weight that was updated with this state, nothing is held any more: it was lent."""
        ...

    def warm_up(self, dtype: torch.dtype, draw: Draw | None, hyper: Hyper) -> None:
        """Compiles what runs on weights of this dtype, where the first step would wait for that. draw, hyper:
        like those of the steps to come; without a draw Adam's. Nothing of theirs is changed."""
        ...


class AtOnce:
    """The part of a Backend that keeps no update back."""

    def take(self, num_elements: int, update: Work) -> list[Written]:
        return [update()]

    def flush(self) -> list[Written]:
        return []

    def drop(self) -> None:
        pass

    def let_go(self, state: State) -> None:
        pass


def new_state(
    shape: torch.Size,
    device: torch.device,
    *,
    rank: int | None,
    compensation: torch.dtype | None,
    is_stack: bool = False,
) -> State:
    """Of a parameter before its first step. rank: None for Adam; compensation: None where none is kept;
    is_stack: of experts, along the first dimension."""
    experts, each = (shape[:1], shape[1:]) if is_stack else (shape[:0], shape)
    moments = shape if rank is None else (*experts, max(each), rank)
    state = {
        "step": torch.zeros(experts, dtype=torch.int64, device=device),
        "exp_avg": torch.zeros(moments, dtype=torch.float32, device=device),
        "exp_avg_sq": torch.zeros(moments, dtype=torch.float32, device=device),
    }
    if rank is not None:
        state["update_norm"] = torch.zeros(experts, dtype=torch.float32, device=device)
    if compensation is not None:
        state["compensation"] = torch.zeros(shape, dtype=compensation, device=device)
    return state


class Expert(NamedTuple):
    """One of a stack. weight, grad, state: its parts of the stack's, views."""

    weight: Tensor
    grad: Tensor
    state: State
    hyper: Hyper


def experts_of(weight: Tensor, grad: Tensor, states: list[State], hyper: Hyper) -> list[Expert]:
    """The random bits of each are those of another parameter."""
    return [
        Expert(weight[e], grad[e], own, hyper._replace(rounding_seed=hyper.rounding_seed ^ e))
        for e, own in enumerate(states)
    ]


def states_of(state: State) -> list[State]:
    """Of a stack's experts: views of its own."""
    return [{key: value[e] for key, value in state.items()} for e in range(len(state["step"]))]


class TorchBackend(AtOnce):
    def warm_up(self, dtype: torch.dtype, draw: Draw | None, hyper: Hyper) -> None:
        pass

    def sketch(self, draw: Draw) -> Sketch:
        return make_sketch(draw)

    def apollo(self, weight: Tensor, grad: Tensor, state: State, sketch: Sketch, hyper: Hyper) -> Tensor:
        if state["step"].dim():
            return self._stack(partial(self._apollo, sketch), weight, grad, state, hyper)
        return self._apollo(sketch, weight, grad, state, hyper)

    def adam(self, weight: Tensor, grad: Tensor, state: State, hyper: Hyper) -> Tensor:
        if state["step"].dim():
            return self._stack(self._adam, weight, grad, state, hyper)
        return self._adam(weight, grad, state, hyper)

    def _stack(
        self, update: Callable[..., Tensor], weight: Tensor, grad: Tensor, state: State, hyper: Hyper
    ) -> Tensor:
        one_by_one = experts_of(weight, grad, states_of(state), hyper)
        return torch.stack([update(*one, (one.grad != 0).any()) for one in one_by_one]).all()

    def _apollo(
        self, sketch: Sketch, weight: Tensor, grad: Tensor, state: State, hyper: Hyper, is_asked: Asked = True
    ) -> Tensor:
        R_cr = project(grad, sketch)
        m_cr, v_cr, U_cr = adam_update(R_cr, state["exp_avg"], state["exp_avg_sq"], state["step"], hyper)
        scale_c = channel_scales(R_cr, U_cr, hyper)
        norm = update_norm(scale_c, R_cr)
        scale_c, norm = limit_growth(scale_c, norm, state["update_norm"], state["step"], grad.numel(), hyper)
        # Also a finite gradient may be too large: squares that overflow would make v infinite for ever.
        ok = (
            torch.isfinite(R_cr.square().sum(dim=1)).all() & torch.isfinite(v_cr).all() & torch.isfinite(norm)
        )
        scale = scale_c if grad.shape[0] >= grad.shape[1] else scale_c.T
        scale = scale.expand(grad.shape)  # strides of 0: takes no memory
        write(weight, lambda rows: grad[rows].float() * scale[rows], ok & is_asked, state, hyper)
        commit(state, {"exp_avg": m_cr, "exp_avg_sq": v_cr, "update_norm": norm}, ok & is_asked)
        return ok

    def _adam(
        self, weight: Tensor, grad: Tensor, state: State, hyper: Hyper, is_asked: Asked = True
    ) -> Tensor:
        m, v, U = adam_update(grad.float(), state["exp_avg"], state["exp_avg_sq"], state["step"], hyper)
        ok, direction = torch.isfinite(v).all() & torch.isfinite(U).all(), torch.atleast_1d(U)
        write(weight, lambda rows: direction[rows], ok & is_asked, state, hyper)
        commit(state, {"exp_avg": m, "exp_avg_sq": v}, ok & is_asked)
        return ok


def project(grad: Tensor, sketch: Sketch, scratch: Tensor | None = None) -> Tensor:
    """R (c, r) fp32 of a gradient (rows, cols), whichever way its channels lie.

    scratch: fp32 memory in which the gradient is converted, a block after the other; fresh memory without it.
    """
    P_kr = dense(sketch)
    R_cr = torch.empty(max(grad.shape), P_kr.shape[1], dtype=torch.float32, device=grad.device)
    is_tall = grad.shape[0] >= grad.shape[1]
    num_elements = CPU_PRODUCT_ELEMENTS if grad.device.type == "cpu" else None
    for block in blocks(channels_first(grad), num_elements):
        G = grad[block] if is_tall else grad[:, block]  # never transposed in memory
        if scratch is None or G.dtype == torch.float32 or G.numel() > len(scratch):
            G = G.float()
        else:
            G = scratch[: G.numel()].view(G.shape).copy_(G)
        torch.matmul(G if is_tall else G.T, P_kr, out=R_cr[block])
    return R_cr


def channels_first(grad: Tensor) -> Tensor:
    """G_ck, or G_eck: a view."""
    return grad if grad.shape[-2] >= grad.shape[-1] else grad.mT


def adam_update(
    grad: Tensor, m: Tensor, v: Tensor, step: Tensor, hyper: Hyper
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, v, U) after `grad` (fp32, like m and v) as step number `step` + 1: new tensors."""
    m = m * hyper.beta1 + grad * (1 - hyper.beta1)
    v = v * hyper.beta2 + grad.square() * (1 - hyper.beta2)
    mhat, vhat = m / _correction(hyper.beta1, step), v / _correction(hyper.beta2, step)
    return m, v, mhat / (vhat.sqrt_() + hyper.eps)


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^(step + 1), on the device; by fp64, since in fp32 1 - 0.999 has an error of 6e-5."""
    return (1 - beta ** (step + 1).double()).float()


def channel_scales(R_cr: Tensor, U_cr: Tensor, hyper: Hyper) -> Tensor:
    """s (c, 1) fp32. At rank 1 one for the whole tensor (APOLLO-Mini): one a channel says too little."""
    over = 1 if R_cr.shape[1] > 1 else (0, 1)
    size = torch.linalg.vector_norm(R_cr, dim=over, keepdim=True) + hyper.eps
    norm_U = torch.linalg.vector_norm(U_cr, dim=over, keepdim=True)
    return (hyper.alpha * norm_U / size).expand(len(R_cr), 1)


def update_norm(scale_c: Tensor, R_cr: Tensor) -> Tensor:
    """|D| (0-dim fp32) with |R_j| in the place of |G_j|: unbiased in its square, and there already."""
    return torch.linalg.vector_norm(scale_c * torch.linalg.vector_norm(R_cr, dim=1, keepdim=True))


def limit_growth(
    scale_c: Tensor, norm: Tensor, previous: Tensor, step: Tensor, num_elements: int, hyper: Hyper
) -> tuple[Tensor, Tensor]:
    """(scale_c, norm) with norm at most limiter_ratio times `previous` (Fira, arXiv:2410.01623).

    The floor: after a step without gradient, growth by 1 % a step from 0 would never come back.
    """
    if not hyper.limiter_ratio:
        return scale_c, norm
    floor = hyper.limiter_floor * math.sqrt(num_elements)
    largest = torch.where(step == 0, norm, hyper.limiter_ratio * previous.clamp(min=floor))
    shrink = torch.where(norm > largest, largest / norm, 1.0)
    return scale_c * shrink, norm * shrink


def write(weight: Tensor, D: Callable[[slice], Tensor], ok: Tensor, state: State, hyper: Hyper) -> None:
    """W <- round(W - lr * (D + weight_decay * W)) in place where `ok`, in blocks of rows.

    By selection: `W - ok * update` would write NaN where the update is NaN.
    """
    weight, step = torch.atleast_1d(weight), state["step"]
    row_elements = weight[0].numel() if len(weight) else 0
    for rows in blocks(weight):
        W = weight[rows].float()
        change = D(rows).add(W, alpha=hyper.weight_decay).mul_(-hyper.lr)
        if hyper.rounding == "kahan":
            compensation = torch.atleast_1d(state["compensation"])[rows]
            rounded, owed = kahan_add(W, compensation, change, hyper.grid)
            compensation.copy_(torch.where(ok, owed, compensation))
        elif hyper.rounding == "nearest":
            rounded = nearest_round(change.add_(W), hyper.grid)
        else:
            offset = rows.start * row_elements
            rounded = stochastic_round(change.add_(W), hyper.grid, hyper.rounding_seed, step, offset)
        weight[rows] = torch.where(ok, rounded.to(weight.dtype), weight[rows])


def commit(state: State, new: State, ok: Tensor) -> None:
    """Takes `new` over and counts the step, where `ok`."""
    for key, value in new.items():
        state[key].copy_(torch.where(ok, value, state[key]))
    state["step"] += ok


def blocks(tensor: Tensor, num_elements: int | None = None) -> Iterator[slice]:
    """Slices of `tensor`'s first dimension, each of a bounded number of elements."""
    num_elements = num_elements or _BLOCK_ELEMENTS.get(tensor.device.type, _BLOCK_ELEMENTS_DEVICE)
    num_rows = max(1, num_elements // max(1, tensor[0].numel())) if len(tensor) else 1
    for start in range(0, len(tensor), num_rows):
        yield slice(start, min(start + num_rows, len(tensor)))
