"""What the tests of the Triton backend share: two optimizers side by side that differ in the backend alone.

Used in Triton's interpreter (test_apollo_triton.py) and on a GPU (tests/gpu/test_triton_step.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from apollo_worker.optimizer.apollo import Apollo
from apollo_worker.optimizer.projection import Draw, Gaussian
from apollo_worker.optimizer.update import Backend, TorchBackend

ROUNDINGS = ["stochastic", "nearest", "kahan"]
BIG_SEED = 0xFEDCBA9876543210  # neither half fits into int32
Made = tuple[torch.nn.Parameter, Apollo]


@cache
def triton_backend() -> Any:
    from apollo_worker.optimizer.gpu import TritonBackend

    return TritonBackend()


class SameProjection(TorchBackend):
    """The reference with the kernels' own P, which is rounded to bf16 for bf16 gradients."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def sketch(self, draw: Draw) -> Gaussian:
        return Gaussian(triton_backend().sketch(draw)(self.dtype).float())


def with_backend(param: torch.nn.Parameter, backend: Backend[Any] | None, **options: Any) -> Made:
    """backend: None for Triton's, which on a CPU is no backend that could be asked for by name."""
    optimizer = Apollo([("w", param)], **{"lr": 1e-3, "seed": 7, "backend": "torch", **options})
    optimizer._backends[param.device.type] = triton_backend() if backend is None else backend
    return param, optimizer


def make(weight: torch.Tensor, backend: Backend[Any] | None = None, **options: Any) -> Made:
    """(a copy of `weight` with its strides, its optimizer)."""
    copy = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    return with_backend(torch.nn.Parameter(copy.copy_(weight)), backend, **options)


def step(param: torch.nn.Parameter, optimizer: Apollo, grad: torch.Tensor) -> None:
    param.grad = grad
    optimizer.step()


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def snapshot(param: torch.nn.Parameter, optimizer: Apollo) -> list[bytes]:
    return [to_bytes(tensor) for tensor in (param, *optimizer.state_tensors().values())]


def assert_same_step(
    reference: Made, ours: Made, before: torch.Tensor, *, error: float = 1e-5, rounding: float = 2**-22
) -> None:
    """After one step from equal weights and states; `before`: the weight.

    error: of sums that are added in another order, of themselves. Those of up to 70 squares differ by less
    than 70 * 2^-24 = 4e-6. rounding: of what is added to a weight, of the sum.
    """
    (expected, state), (got, own) = ((p.detach(), o.state_tensors()) for p, o in (reference, ours))
    assert torch.equal(state["w.step"], own["w.step"])
    for key in ("w.exp_avg", "w.exp_avg_sq", "w.update_norm"):
        if key in state:
            largest = state[key].abs().max().item()
            torch.testing.assert_close(own[key], state[key], rtol=error, atol=error / 10 * largest)
    atol = error * (expected.float() - before.float()).abs().max().item()
    if expected.dtype == torch.float32:  # where what is left over is kept, it belongs to the value
        expected, got = (w + s.get("w.compensation", 0.0) for w, s in ((expected, state), (got, own)))
        torch.testing.assert_close(got, expected, rtol=rounding, atol=atol)
        return
    # Before rounding the two differ by 2^-24 of |W| + |change| for each of four operations and `error` of the
    # change at most: rarely by 2^-10 of the distance of two bf16 values, 2^-8 of the value. So at most one
    # element in 1,000 is expected to fall on the other side, and to the neighbour, at most 2^-7 away; other
    # random bits would move one in five.
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=atol)
    assert (got != expected).sum() <= 1 + expected.numel() // 200
