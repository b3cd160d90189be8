"""The optimizer's rule once more, in fp64 and one channel at a time, and what its tests share."""

import math

import torch
from apollo_worker.optimizer.apollo import LIMITER_FLOOR
from apollo_worker.optimizer.projection import projection

torch.set_num_threads(2)
CPU = torch.device("cpu")


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def parameter(*shape, seed=0, dtype=torch.float32):
    return torch.nn.Parameter(randn(*shape, seed=seed, scale=0.02).to(dtype))


def run(optimizer, param, grads):
    for grad in grads:
        param.grad = grad.clone().to(param.dtype)
        optimizer.step()


def snapshot(optimizer, *params):
    return [p.detach().clone() for p in params] + [t.clone() for t in optimizer.state_tensors().values()]


def identical(a, b):
    """Bit for bit, so that NaN equals itself and -0.0 differs from 0.0."""
    return [(x.dtype, to_bytes(x)) for x in a] == [(y.dtype, to_bytes(y)) for y in b]


def to_bytes(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def reference(
    W, grads, *, name, lr, rank, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, refresh_steps=200,
    ratio=1.01, seed=0, alpha=None,
):  # fmt: skip
    """Section 3 of the design, in fp64, one channel at a time; W as (rows, cols). Returns W, all |D|."""
    W = W.double()
    transposed = W.shape[0] < W.shape[1]
    W = W.T.clone() if transposed else W.clone()
    num_channels, k = W.shape
    m = torch.zeros(num_channels, rank, dtype=torch.float64)
    v = torch.zeros_like(m)
    norms = []
    for t, grad in enumerate(grads, start=1):
        G = grad.double().T if transposed else grad.double()
        P = projection(seed, name, (t - 1) // refresh_steps, k, rank, CPU).double()
        R, U = torch.zeros_like(m), torch.zeros_like(m)
        for j in range(num_channels):
            R[j] = G[j] @ P
            m[j] = betas[0] * m[j] + (1 - betas[0]) * R[j]
            v[j] = betas[1] * v[j] + (1 - betas[1]) * R[j] ** 2
            U[j] = (m[j] / (1 - betas[0] ** t)) / ((v[j] / (1 - betas[1] ** t)).sqrt() + eps)
        D, norm2 = torch.zeros_like(G), 0.0
        for j in range(num_channels):
            s = U.norm() / (R.norm() + eps) if rank == 1 else U[j].norm() / (R[j].norm() + eps)
            s *= math.sqrt(k / rank) if alpha is None else alpha
            D[j] = s * G[j]
            norm2 += float(s * R[j].norm()) ** 2  # |R_j| stands for |G_j|: the limiter's norm costs nothing
        norm = math.sqrt(norm2)
        if ratio and norms:
            largest = ratio * max(norms[-1], LIMITER_FLOOR * math.sqrt(D.numel()))
            if norm > largest:
                D, norm = D * (largest / norm), largest
        norms.append(norm)
        W -= lr * (D + weight_decay * W)
    return (W.T if transposed else W), norms


# fp32 against fp64: a relative error of some 1e-6 per operation, some ten of them and dot products of up
# to 48 terms behind each update; the weights themselves are kept in fp32 (6e-8 of |W| a step). An error in
# the rule (a bias correction, a factor, another channel) shows at 1e-2 or more.
TOLERANCE = 1e-4


def largest_error(W, expected, start):
    return ((W.double() - expected).abs().max() / (expected - start.double()).abs().max()).item()
