"""The Triton step on CUDA: the reference's results, no host sync, no temporaries, no write by a bad gradient.

The same comparisons as in tests/unit/optimizer/test_apollo_triton.py, whose interpreter has no tensor cores,
no warps and nothing that runs at the same time.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from apollo_worker.optimizer.backend import choose_backend
from apollo_worker.optimizer.projection import Draw, block_sign, projection
from apollo_worker.optimizer.rounding import hash_bits
from apollo_worker.optimizer.update import TorchBackend
from triton_twins import (
    BIG_SEED,
    ROUNDINGS,
    SameProjection,
    assert_same_step,
    make,
    snapshot,
    step,
    triton_backend,
    with_backend,
)

pytest.importorskip("triton")
CUDA = torch.device("cuda")
# Products of bf16 are exact in fp32: R differs by the order of up to 1,000 sums, some 1e-6 of |G| |P|.
ERRORS = {"error": 1e-4, "rounding": 2**-21}


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA) * scale


def test_a_gpus_backend_is_tritons_where_nothing_else_is_asked_for() -> None:
    assert type(choose_backend("cuda")).__name__ == "TritonBackend"


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("projection", ["gaussian", "block_sign"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "rank"), [((1023, 515), 64), ((512, 3000), 64), ((777, 1024), 1), ((70, 33), 33)]
)
def test_three_steps_are_the_references(shape, rank, dtype, projection, rounding) -> None:
    options = {
        "rank": rank,
        "projection": projection,
        "rounding": rounding,
        "refresh_steps": 2,
        "betas": (0.5, 0.999),
        "limiter_floor": 0.01,
    }
    options["weight_decay"] = 0.1
    weight = randn(*shape, scale=0.02).to(dtype)
    reference, ours = make(weight, SameProjection(dtype), **options), make(weight, **options)
    norms = []
    for i in range(3):
        before = reference[0].detach().clone()
        grad = (randn(*shape, seed=i + 1) * [1, 1e-3, 30][i]).to(dtype)
        for made in (reference, ours):
            step(*made, grad.clone())
        assert_same_step(reference, ours, before, **ERRORS)
        norms.append(ours[1].state_tensors()["w.update_norm"].item())
        ours[0].data.copy_(reference[0].data)  # so that each step begins with equals
        ours[1].load_state(reference[1].state_tensors(), reference[1].state_meta())
    largest = 1.01 * max(norms[1], 0.01 * math.sqrt(weight.numel()))
    assert norms[2] == pytest.approx(largest, rel=1e-5), "the limiter did not bite"


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", [(), (5120,), (10240, 1, 4), (48, 5120), (3, 3001)])
def test_adam_is_the_references(shape, rounding) -> None:
    weight = randn(*shape, scale=0.02).bfloat16()
    options = {"rounding": rounding, "weight_decay": 0.1}
    reference, ours = make(weight, TorchBackend(), **options), make(weight, **options)
    for made in (reference, ours):
        step(*made, randn(*shape, seed=1).bfloat16())
    assert_same_step(reference, ours, weight, **ERRORS)


def test_a_step_is_repeated_bit_for_bit() -> None:
    results = []
    for _ in range(2):
        made = make(randn(1024, 5120, scale=0.02).bfloat16())
        for seed in (1, 2):
            step(*made, randn(1024, 5120, seed=seed).bfloat16())
        results.append(snapshot(*made))
    assert results[0] == results[1]


@pytest.mark.parametrize("k", [33, 5120])
def test_projections_and_random_bits_are_those_of_the_cpu(k: int) -> None:
    from apollo_worker.optimizer import gpu_kernels as triton_kernels
    from apollo_worker.optimizer.gpu import _halves

    seed, arguments = BIG_SEED, (BIG_SEED, "w", torch.tensor(3), k, 64, torch.device("cpu"))
    bits = torch.empty(5000, dtype=torch.int32, device=CUDA)
    triton_kernels.hash_counters[(40,)](bits, torch.tensor(9, device=CUDA), *_halves(seed), 5000, BLOCK=128)
    assert torch.equal(bits.cpu(), hash_bits(5000, seed, 9, device=torch.device("cpu")))
    index = torch.tensor(3, device=CUDA)
    make_P = triton_backend().sketch(Draw("gaussian", seed, "w", index, k, 64, CUDA))
    # Normals of up to 5.8 / 8, from logarithms and cosines right to two or three last bits.
    torch.testing.assert_close(make_P(torch.float32).cpu(), projection(*arguments), rtol=1e-5, atol=1e-6)
    assert torch.equal(make_P(torch.bfloat16), make_P(torch.float32).bfloat16())
    signs = triton_backend().sketch(Draw("block_sign", seed, "w", index, k, 64, CUDA))(torch.bfloat16)
    assert torch.equal(signs.float().cpu(), block_sign(*arguments).dense())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    "view", [lambda t: t[100:700], lambda t: t.T, lambda t: t[:, 33:557].T, lambda t: t[::2, ::3]]
)
def test_a_view_is_written_in_place_and_like_a_parameter_of_its_own(view, rounding) -> None:
    storage = randn(1000, 1024, scale=0.02).bfloat16()
    around = torch.ones(storage.shape, dtype=torch.bool, device=CUDA)
    view(around)[:] = False
    untouched = storage[around].clone()
    own, optimizer = make(view(storage).contiguous(), rounding=rounding)
    viewed, of_view = with_backend(torch.nn.Parameter(view(storage)), None, rounding=rounding)
    for made in ((own, optimizer), (viewed, of_view)):
        step(*made, randn(*own.shape, seed=1).bfloat16())
    assert torch.equal(own, viewed)
    assert torch.equal(storage[around], untouched)


def test_offsets_beyond_two_to_the_31_are_right() -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("5 GB of free GPU memory are needed")
    storage = torch.zeros(2**31 + 128, dtype=torch.bfloat16, device=CUDA)
    far = storage.as_strided((2, 64), (2**31 + 64, 1))
    far.copy_(randn(2, 64, scale=0.02))
    own, optimizer = make(far.contiguous(), rank=2)
    param, of_view = with_backend(torch.nn.Parameter(far), None, rank=2)
    for made in ((own, optimizer), (param, of_view)):
        step(*made, randn(2, 64, seed=1).bfloat16())
    assert torch.equal(own, far)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
@pytest.mark.parametrize("shape", [(1023, 515), (515, 1024), (5120,), (48, 5120), ()])
def test_a_gradient_that_is_not_finite_changes_nothing_at_all(shape, bad, rounding) -> None:
    made = make(randn(*shape, scale=0.02).bfloat16(), rounding=rounding)
    step(*made, randn(*shape, seed=1).bfloat16())
    before = snapshot(*made)
    grad = randn(*shape, seed=2).bfloat16()
    grad.view(-1)[-1] = bad
    step(*made, grad)
    assert made[1].take_bad_updates() == 1
    assert snapshot(*made) == before


@pytest.mark.parametrize("projection", ["gaussian", "block_sign"])
def test_the_host_waits_for_nothing(projection: str) -> None:
    shapes = [(1024, 512), (512, 1024), (5120,), (48, 5120), ()]
    options = {"projection": projection}
    made = [make(randn(*shape, scale=0.02).bfloat16(), **options) for shape in shapes]
    for one, shape in zip(made, shapes, strict=True):
        step(*one, randn(*shape, seed=1).bfloat16())  # compiles, loads, makes cuBLAS's handle
    grads = [randn(*shape, seed=2).bfloat16() for shape in shapes]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for one, grad in zip(made, grads, strict=True):
            step(*one, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(5120, 17408), (17408, 5120)])
def test_a_step_needs_no_memory_of_the_weights_size_and_its_time_is_told(shape, capsys) -> None:
    weight, grad = randn(*shape, scale=0.02).bfloat16(), randn(*shape, seed=1).bfloat16()
    rank, (k, c) = 64, sorted(shape)
    made = make(weight, rank=rank)
    step(*made, grad)  # compiles, and makes cuBLAS's workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step(*made, grad)
    peak = torch.cuda.max_memory_allocated() - held
    assert peak <= 4 * c * rank + 2 * k * rank + weight.nbytes // 10

    def median_ms(run: Any) -> float:
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[10]

    # The floor: the gradient read twice, the weight and the moments read and written, by one long copy.
    floor_bytes = 4 * weight.nbytes + 4 * 4 * c * rank
    source, target = torch.empty(2, floor_bytes // 2, dtype=torch.uint8, device=CUDA)
    floor_ms, step_ms = median_ms(lambda: target.copy_(source)), median_ms(lambda: step(*made, grad))
    with capsys.disabled():
        print(f"\n{shape}: {step_ms:.3f} ms a step, {floor_ms:.3f} ms for a copy of as many bytes")
