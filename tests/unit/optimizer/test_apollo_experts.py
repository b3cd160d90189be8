"""Stacks of experts: each is updated as a parameter of its own would be, and one that was not asked stays."""

from __future__ import annotations

import math

import pytest
import torch
from apollo_reference import TOLERANCE, identical, largest_error, randn, reference, run, snapshot
from apollo_worker.optimizer.apollo import Apollo
from apollo_worker.optimizer.update import CPU_HELD_ELEMENTS

BACKENDS = ["torch", "numba"]
ROUNDINGS = ["stochastic", "nearest", "kahan"]
SHAPES = {"tall": (4, 48, 24), "wide": (4, 24, 48), "thin": (4, 48, 7), "bias": (4, 24)}


def stack(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    return torch.nn.Parameter(randn(*shape, scale=0.02).to(dtype))


def optimizer_of(param: torch.nn.Parameter, **options: object) -> Apollo:
    return Apollo([("w", param)], **{"lr": 1e-2, "rank": 8, "stacks": ["w"], **options})


def parts(optimizer: Apollo, expert: int) -> list[torch.Tensor]:
    """Of its weight and its state."""
    (param,) = optimizer.param_groups[0]["params"]
    return [t[expert].clone() for t in (param.detach(), *optimizer.state_tensors().values())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_expert_is_updated_as_a_parameter_of_its_own(shape, rounding, dtype, backend):
    """Of the same name, so with the same projection."""
    options = {"rounding": rounding, "backend": backend, "weight_decay": 0.1, "refresh_steps": 2}
    whole = stack(*SHAPES[shape], dtype=dtype)
    alone = [torch.nn.Parameter(part.clone()) for part in whole.detach()]
    grads = [randn(*whole.shape, seed=i, scale=1 + 9 * (i == 3)) for i in range(5)]
    together = optimizer_of(whole, **options)
    run(together, whole, grads)
    for expert, param in enumerate(alone):
        optimizer = optimizer_of(param, **options, stacks=[])
        run(optimizer, param, [grad[expert] for grad in grads])
        assert identical(parts(together, expert), snapshot(optimizer, param)), expert


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_an_expert_that_is_asked_now_and_then_counts_its_own_steps(shape, backend):
    param = stack(*SHAPES[shape], dtype=torch.float32)
    start, grads = param.detach().clone(), [randn(*param.shape, seed=i) for i in range(6)]
    asked = {0: range(6), 1: [0, 3, 4], 2: [5], 3: []}
    for i, grad in enumerate(grads):
        for expert, steps in asked.items():
            if i not in steps:
                grad[expert] = 0.0
    optimizer = optimizer_of(param, backend=backend)
    run(optimizer, param, grads)
    assert optimizer.state_tensors()["w.step"].tolist() == [6, 3, 1, 0]
    for expert, steps in asked.items():
        if steps:
            expected, _ = reference(
                start[expert], [grads[i][expert] for i in steps], name="w", lr=1e-2, rank=8
            )
            assert largest_error(param[expert].detach(), expected, start[expert]) < TOLERANCE
    assert torch.equal(param[3], start[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_expert_without_any_gradient_stays_as_it_is_to_the_last_bit(shape, rounding, backend):
    """After steps that have left it momentum, and with a weight decay."""
    param = stack(*SHAPES[shape])
    optimizer = optimizer_of(param, rounding=rounding, backend=backend, weight_decay=0.1)
    run(optimizer, param, [randn(*param.shape, seed=i) for i in range(3)])
    before = [parts(optimizer, expert) for expert in range(4)]
    grad = randn(*param.shape, seed=9)
    grad[1], grad[3] = 0.0, -0.0
    run(optimizer, param, [grad])
    is_same = [identical(parts(optimizer, expert), before[expert]) for expert in range(4)]
    assert is_same == [False, True, False, True]
    assert optimizer.take_bad_updates() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gradient_that_is_not_finite_stops_its_own_expert_alone(shape, bad, backend):
    param = stack(*SHAPES[shape])
    optimizer = optimizer_of(param, backend=backend)
    run(optimizer, param, [randn(*param.shape)])
    before = [parts(optimizer, expert) for expert in range(4)]
    grad = randn(*param.shape, seed=9)
    grad[2].view(-1)[-1] = bad
    run(optimizer, param, [grad])
    is_same = [identical(parts(optimizer, expert), before[expert]) for expert in range(4)]
    assert is_same == [False, False, True, False]
    assert optimizer.take_bad_updates() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_experts_that_are_alike_are_rounded_by_different_bits(backend):
    one = randn(1, 48, 24, scale=0.02).bfloat16()
    param, grad = torch.nn.Parameter(one.repeat(2, 1, 1)), randn(1, 48, 24, seed=1).repeat(2, 1, 1)
    run(optimizer_of(param, backend=backend, lr=1e-5), param, [grad])
    assert 0.01 < (param[0] != param[1]).float().mean() < 0.5


def test_both_backends_draw_the_same_bits_for_each_expert():
    """Adam adds up nothing: the same results to the last bit."""
    results = []
    for backend in BACKENDS:
        param = stack(*SHAPES["thin"])
        optimizer = optimizer_of(param, backend=backend)
        run(optimizer, param, [randn(*param.shape, seed=i) for i in range(3)])
        results.append(snapshot(optimizer, param))
    assert identical(*results)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_turned_stack_is_written_in_place_and_like_one_of_its_own(rounding):
    storage = randn(4, 24, 48, scale=0.02).bfloat16()
    turned, own = torch.nn.Parameter(storage.mT), torch.nn.Parameter(storage.mT.contiguous())
    for param in (turned, own):
        optimizer = optimizer_of(param, rounding=rounding, backend="torch")
        run(optimizer, param, [randn(*param.shape, seed=i) for i in range(3)])
    assert torch.equal(turned, own)
    assert torch.equal(storage.mT, own)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_and_resumed_stack_goes_on_bit_for_bit(shape):
    grads = [randn(*SHAPES[shape], seed=i) for i in range(6)]
    for i, grad in enumerate(grads):
        grad[i % 4] = 0.0
    straight = stack(*SHAPES[shape])
    optimizer = optimizer_of(straight, refresh_steps=2)
    run(optimizer, straight, grads[:3])
    resumed = torch.nn.Parameter(straight.detach().clone())
    other = optimizer_of(resumed, refresh_steps=2)
    other.load_state({k: t.clone() for k, t in optimizer.state_tensors().items()}, optimizer.state_meta())
    run(optimizer, straight, grads[3:])
    run(other, resumed, grads[3:])
    assert identical(snapshot(optimizer, straight), snapshot(other, resumed))


def test_the_state_of_a_stack_is_that_of_its_projections():
    param = torch.nn.Parameter(torch.zeros(4, 96, 256, dtype=torch.bfloat16))
    optimizer = optimizer_of(param, rank=16)
    assert optimizer.fallbacks() == []
    shapes = {key: list(tensor.shape) for key, tensor in optimizer.state_tensors().items()}
    assert shapes == {
        "w.step": [4], "w.exp_avg": [4, 256, 16], "w.exp_avg_sq": [4, 256, 16], "w.update_norm": [4],
    }  # fmt: skip
    assert optimizer.state_size_bytes() == 4 * (2 * 256 * 16 * 4 + 8 + 4)
    as_adam = Apollo([("w", param)], lr=1e-2, rank=16)
    assert as_adam.state_size_bytes() == 2 * 4 * param.numel() + 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stack_whose_experts_are_shared_out_among_threads_is_the_same(dtype, monkeypatch):
    results = []
    for held in (CPU_HELD_ELEMENTS, 100):
        monkeypatch.setattr("apollo_worker.optimizer.cpu.CPU_HELD_ELEMENTS", held)
        param = stack(6, 48, 64, dtype=dtype)
        optimizer = optimizer_of(param, backend="numba")
        grads = [randn(*param.shape, seed=i) for i in range(3)]
        grads[1][2] = 0.0
        run(optimizer, param, grads)
        results.append(snapshot(optimizer, param))
    assert identical(*results)
