"""The mathematics of APOLLO (arXiv:2412.05270): Adam's step size per channel, from a random projection.

Legend: k = smaller dim of a parameter, c = larger dim ("channels"), r = rank.
    P_kr ~ N(0, 1/r)          from (seed, parameter name, refresh index); never stored
    R_cr = G_ck P_kr          G_ck: the gradient with its channels first (a view, never a copy)
    m_cr, v_cr                Adam's moments of R, fp32
    s_j = |U_j| / (|R_j| + eps),  U = mhat / (sqrt(vhat) + eps)
    D = alpha * s * G,  alpha = sqrt(k / r),  |D| <= limiter_ratio * |D of the step before|
    W <- round(W - lr * (D + weight_decay * W))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_worker.rounding import hash_bits

# Root mean square of D (in units of lr; Adam's own is 0.1 to 1) below which the limiter does not bite:
# after a step without gradient, growth by 1 % a step from 0 would never come back.
LIMITER_FLOOR_RMS = 0.01

# Elements worked on at a time, so that fp32 temporaries stay small beside the weight: on a CPU in its
# cache, on a GPU 64 MiB each.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_DEVICE = 2**24


def derive_seed(seed: int, name: str, purpose: str) -> int:
    """64 bits that depend on all three and on nothing else: not on order, process or device."""
    return int.from_bytes(blake2b(f"{seed}\0{name}\0{purpose}".encode(), digest_size=8).digest(), "little")


def projection(
    seed: int, name: str, refresh_index: int | Tensor, min_dim: int, rank: int, device: torch.device
) -> Tensor:
    """P (min_dim, rank) fp32 ~ N(0, 1/rank), made anew on `device` whenever it is needed.

    By Box-Muller from counter hashes: `refresh_index` may be a tensor on the device, and 27B's 280 million
    normals a step cost neither a CPU second nor a copy. The hashed bits are equal on all devices; log, cos
    and sin may differ in the last bit between a CPU and a GPU.
    """
    num_pairs = (min_dim * rank + 1) // 2
    bits = hash_bits(2 * num_pairs, derive_seed(seed, name, "projection"), refresh_index, device=device)
    uniform = ((bits >> 8) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)  # in (0, 1]
    radius = uniform[:num_pairs].log().mul_(-2.0 / rank).sqrt_()
    angle = uniform[num_pairs:] * (2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[: min_dim * rank].view(min_dim, rank)


class ApolloUpdate(NamedTuple):
    """What one step makes of a 2-D gradient; `ok` (0-dim bool) says whether any of it may be used."""

    m_cr: Tensor  # (c, r) fp32
    v_cr: Tensor  # (c, r) fp32
    scale_c: Tensor  # (c, 1) fp32: D = scale * gradient, channels first
    norm: Tensor  # 0-dim fp32: |D|
    ok: Tensor


def apollo_update(
    grad: Tensor,
    P_kr: Tensor,
    m_cr: Tensor,
    v_cr: Tensor,
    step: Tensor,
    previous_norm: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    alpha: float,
    limiter_ratio: float,
) -> ApolloUpdate:
    """One APOLLO step (Algorithm 1 of arXiv:2412.05270) as a function of gradient and state.

    grad: (rows, cols), any float dtype; step: 0-dim integer, steps done before this one; previous_norm:
    0-dim, |D| of that step; limiter_ratio 0: no limiter (Fira's, arXiv:2410.01623). At rank 1 there is one
    scale for the whole tensor (APOLLO-Mini), since a channel's single projected number says too little.
    """
    G_ck = grad if grad.shape[0] >= grad.shape[1] else grad.T
    R_cr = torch.empty_like(m_cr)
    grad_norm_c = torch.empty(len(G_ck), 1, dtype=torch.float32, device=grad.device)
    for block in blocks(G_ck):
        G = G_ck[block].float()
        torch.matmul(G, P_kr, out=R_cr[block])
        torch.linalg.vector_norm(G, dim=1, keepdim=True, out=grad_norm_c[block])

    m_cr, v_cr, U_cr = adam_update(R_cr, m_cr, v_cr, step, betas, eps)
    over = 1 if P_kr.shape[1] > 1 else (0, 1)
    norm_U = torch.linalg.vector_norm(U_cr, dim=over, keepdim=True)
    norm_R = torch.linalg.vector_norm(R_cr, dim=over, keepdim=True)
    scale_c = (alpha * norm_U / (norm_R + eps)).expand(len(G_ck), 1)
    norm = torch.linalg.vector_norm(scale_c * grad_norm_c)
    if limiter_ratio:
        floor = LIMITER_FLOOR_RMS * math.sqrt(grad.numel())
        largest = torch.where(step == 0, norm, limiter_ratio * previous_norm.clamp(min=floor))
        shrink = torch.where(norm > largest, largest / norm, 1.0)
        scale_c, norm = scale_c * shrink, norm * shrink
    # Also a finite gradient may be too large: squares that overflow would make v infinite for ever.
    ok = torch.isfinite(grad_norm_c).all() & torch.isfinite(v_cr).all() & torch.isfinite(norm)
    return ApolloUpdate(m_cr, v_cr, scale_c, norm, ok)


def adam_update(
    grad: Tensor, m: Tensor, v: Tensor, step: Tensor, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, v, U) after `grad` (fp32, like m and v): new tensors; bias-corrected on the device."""
    beta1, beta2 = betas
    num_steps = (step + 1).double()  # in fp32 1 - 0.999 has an error of 6e-5
    correction1, correction2 = (1 - beta1**num_steps).float(), (1 - beta2**num_steps).float()
    m = m * beta1 + grad * (1 - beta1)
    v = v * beta2 + grad.square() * (1 - beta2)
    return m, v, (m / correction1) / ((v / correction2).sqrt_() + eps)


def blocks(tensor: Tensor) -> Iterator[slice]:
    """Slices of `tensor`'s first dimension, each of a bounded number of elements."""
    num_elements = _BLOCK_ELEMENTS.get(tensor.device.type, _BLOCK_ELEMENTS_DEVICE)
    num_rows = max(1, num_elements // max(1, tensor[0].numel())) if len(tensor) else 1
    for start in range(0, len(tensor), num_rows):
        yield slice(start, min(start + num_rows, len(tensor)))
