"""The optimizer against a slow fp64 reference and against apollo-torch; its guards and its place in memory.

apollo-torch (CC-BY-NC) is only called here, as an oracle.
"""

import itertools
import math

import pytest
import torch
from apollo_reference import (
    CPU,
    TOLERANCE,
    identical,
    largest_error,
    parameter,
    randn,
    reference,
    run,
    snapshot,
)
from apollo_torch import APOLLOAdamW
from apollo_torch.random_projector import GradientProjector
from apollo_worker.optimizer import cpu as apollo_cpu
from apollo_worker.optimizer.apollo import LIMITER_FLOOR, Apollo
from apollo_worker.optimizer.projection import projection


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 2, 8, 24])
@pytest.mark.parametrize(("weight_decay", "ratio"), [(0.0, 0.0), (0.1, 1.01)])
def test_the_optimizer_is_the_design_formula_in_both_orientations(shape, rank, weight_decay, ratio, backend):
    grads = [randn(*shape, seed=i, scale=1 + 3 * (i % 3)) for i in range(7)]
    start, param = parameter(*shape).data.clone(), parameter(*shape)
    options = {"lr": 1e-2, "rank": rank, "weight_decay": weight_decay, "refresh_steps": 3, "seed": 5}
    optimizer = Apollo([("layer.weight", param)], limiter_ratio=ratio, backend=backend, **options)
    run(optimizer, param, grads)
    expected, norms = reference(start, grads, name="layer.weight", ratio=ratio, **options)
    assert largest_error(param, expected, start) < TOLERANCE
    norm = optimizer.state_tensors()["layer.weight.update_norm"].item()
    assert norm == pytest.approx(norms[-1], rel=TOLERANCE)


def test_a_large_parameter_is_the_formula_too_when_it_is_worked_on_in_blocks(monkeypatch):
    monkeypatch.setattr("apollo_worker.optimizer.update._BLOCK_ELEMENTS", {"cpu": 100})
    for shape in [(24, 48), (48, 24)]:
        grads = [randn(*shape, seed=i) for i in range(3)]
        start, param = parameter(*shape).data.clone(), parameter(*shape)
        run(Apollo([("w", param)], lr=1e-2, rank=4, backend="torch"), param, grads)
        assert largest_error(param, reference(start, grads, name="w", lr=1e-2, rank=4)[0], start) < TOLERANCE


def test_blocks_do_not_change_what_stochastic_rounding_draws(monkeypatch):
    results = []
    for elements in (100, 2**18):
        monkeypatch.setattr("apollo_worker.optimizer.update._BLOCK_ELEMENTS", {"cpu": elements})
        param = parameter(7, 33, dtype=torch.bfloat16)  # 231 elements in rows of 33: odd offsets
        optimizer = Apollo([("w", param)], lr=1e-3, rank=100, backend="torch")
        run(optimizer, param, [randn(7, 33, seed=i) for i in range(3)])
        results.append(param.data.clone())
    assert torch.equal(*results)


def test_a_given_alpha_replaces_the_square_root_of_k_over_r():
    grads, start, param = (
        [randn(32, 16, seed=i) for i in range(2)],
        parameter(32, 16).data.clone(),
        parameter(32, 16),
    )
    run(Apollo([("w", param)], lr=1e-2, rank=1, alpha=math.sqrt(128)), param, grads)
    expected, _ = reference(start, grads, name="w", lr=1e-2, rank=1, alpha=math.sqrt(128))
    assert largest_error(param, expected, start) < TOLERANCE


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_optimizer_agrees_with_apollo_torch_at_scale_k_over_r(shape, rank, monkeypatch):
    k, refresh_steps = min(shape), 4
    refreshes = itertools.count()

    def ours(self, weights, rank, type, seed):
        P_kr = projection(0, "w", next(refreshes), k, rank, CPU)
        return P_kr if type == "left" else P_kr.T

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", ours)
    mine, theirs = parameter(*shape), parameter(*shape)
    start = mine.data.clone()
    group = {
        "params": [theirs], "rank": rank, "update_proj_gap": refresh_steps, "scale": k / rank,
        "proj": "random", "proj_type": "std", "scale_type": "tensor" if rank == 1 else "channel",
    }  # fmt: skip
    oracle = APOLLOAdamW([group], lr=1e-2, eps=1e-12, disable_nl=True)
    optimizer = Apollo(
        [("w", mine)], lr=1e-2, eps=1e-12, rank=rank, refresh_steps=refresh_steps, limiter_ratio=0
    )
    for i in range(9):
        mine.grad = randn(*shape, seed=i)
        theirs.grad = mine.grad.clone()
        optimizer.step()
        oracle.step()
    # Theirs adds eps to sqrt(v) before the bias correction, hence an eps that does not count; and a fixed
    # 1e-8 to |R|, which is of size 1.
    assert next(refreshes) == 3
    assert largest_error(mine, theirs.detach().double(), start) < TOLERANCE


LARGE = pytest.param((5120, 5120), marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[(512, 768), (768, 512), (1024, 1536), LARGE], ids=str)
def full_rank(request):
    """Gradients of one shape, and the norm of full-rank channel-wise Adam's update after them."""
    shape = request.param
    grads = [randn(*shape, seed=i) for i in range(5)]
    m, v = torch.zeros(shape), torch.zeros(shape)
    for G in grads:
        m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G**2
    U = (m / (1 - 0.9 ** len(grads))) / (v / (1 - 0.999 ** len(grads))).sqrt()
    across = 0 if shape[0] < shape[1] else 1
    full = grads[-1] * U.norm(dim=across, keepdim=True) / grads[-1].norm(dim=across, keepdim=True)
    return grads, full.norm().item()


@pytest.mark.parametrize("projection", ["gaussian", "block_sign"])
@pytest.mark.parametrize("rank", [16, 64, 256])
def test_the_update_has_the_size_of_full_rank_channel_wise_adams(rank, full_rank, projection):
    grads, full_norm = full_rank
    param = parameter(*grads[0].shape)
    options = {"limiter_ratio": 0, "projection": projection}
    optimizer = Apollo([("w", param)], lr=1e-3, rank=rank, **options)
    run(optimizer, param, grads)
    ratio = optimizer.state_tensors()["w.update_norm"].item() / full_norm
    assert 0.95 < ratio < 1.10  # an alpha counted twice gives 2.9 and more


def test_the_projection_is_normal_with_variance_one_over_rank_and_never_the_same_twice():
    P = projection(0, "a", 0, 4000, 25, CPU).double() * 5
    # 1e5 normals: sigma of the mean 1/316, of the variance sqrt(2)/316, of the fourth moment sqrt(96)/316.
    assert abs(P.mean().item()) < 4 / 316
    assert abs((P**2).mean().item() - 1) < 4 * math.sqrt(2) / 316
    assert abs((P**4).mean().item() - 3) < 4 * math.sqrt(96) / 316
    others = [projection(*key, 4000, 25, CPU).double() * 5 for key in [(1, "a", 0), (0, "b", 0), (0, "a", 1)]]
    for other in others:
        assert abs((P * other).mean().item()) < 4 / 316
    assert torch.equal(
        projection(0, "a", 1, 4000, 25, CPU), projection(0, "a", torch.tensor(1), 4000, 25, CPU)
    )


def test_the_limiter_lets_the_update_grow_by_its_ratio_only():
    norms = {}
    for ratio in (0, 1.01):
        param = parameter(64, 64)
        options = {"limiter_ratio": ratio, "limiter_floor": 0.01, "betas": (0.0, 0.999)}
        optimizer = Apollo([("w", param)], lr=1e-3, rank=16, **options)
        grads = [randn(64, 64, seed=i, scale=100.0 if i == 5 else 1.0) for i in range(7)]
        norms[ratio] = []
        for grad in grads:
            run(optimizer, param, [grad])
            norms[ratio].append(optimizer.state_tensors()["w.update_norm"].item())
    growth = [b / a for a, b in itertools.pairwise(norms[1.01])]
    assert max(growth) == pytest.approx(1.01, rel=1e-5)
    assert max(b / a for a, b in itertools.pairwise(norms[0])) > 2


def test_a_step_without_gradient_does_not_stop_a_parameter_for_ever():
    param = parameter(64, 64)
    optimizer = Apollo([("w", param)], lr=1e-3, rank=16, betas=(0.0, 0.999))
    run(optimizer, param, [torch.zeros(64, 64), randn(64, 64)])
    norm = optimizer.state_tensors()["w.update_norm"].item()
    assert norm == pytest.approx(1.01 * LIMITER_FLOOR * 64, rel=1e-5)


FALLBACK_SHAPES = {"scalar": (), "norm.weight": (16,), "conv1d.weight": (12, 1, 4), "thin.weight": (64, 7)}


def test_what_is_not_2d_or_below_the_rank_is_adam_and_is_named():
    params = {name: parameter(*shape) for name, shape in FALLBACK_SHAPES.items()}
    twins = {name: parameter(*shape) for name, shape in FALLBACK_SHAPES.items()}
    params["square.weight"] = parameter(8, 8)
    optimizer = Apollo(params.items(), lr=1e-2, rank=8, weight_decay=0.1, limiter_ratio=1.01)
    assert optimizer.fallbacks() == list(FALLBACK_SHAPES)
    oracle = torch.optim.AdamW(twins.values(), lr=1e-2, weight_decay=0.1)
    for i in range(5):
        for name, twin in twins.items():
            twin.grad = randn(*FALLBACK_SHAPES[name], seed=i)
            params[name].grad = twin.grad.clone()
        optimizer.step()
        oracle.step()
    for name, twin in twins.items():  # ours in another order of operations: fp32 rounding of |W| <= 0.1
        torch.testing.assert_close(params[name], twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
def test_a_gradient_that_is_not_finite_changes_nothing_at_all(rounding, bad):
    shapes = {"tall": (40, 20), "wide": (20, 40), "norm": (24,), "scalar": ()}
    params = {name: parameter(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    optimizer = Apollo(params.items(), lr=1e-3, rank=8, rounding=rounding)
    for i in range(3):
        for p in params.values():
            p.grad = randn(*p.shape, seed=i).bfloat16()
        optimizer.step()
    assert optimizer.take_bad_updates() == 0
    before = snapshot(optimizer, *params.values())
    for p in params.values():
        p.grad = randn(*p.shape, seed=9).bfloat16()
        p.grad.view(-1)[-1] = bad  # 3e38 is finite, but its square is not: v would be infinite for ever
    optimizer.step()
    assert identical(snapshot(optimizer, *params.values()), before)
    assert all(p.grad is None for p in params.values())
    assert optimizer.take_bad_updates() == 4
    assert optimizer.take_bad_updates() == 0


def test_a_run_with_a_bad_step_in_it_goes_on_as_if_it_had_not_been():
    grads = [randn(32, 48, seed=i) for i in range(8)]
    bad = grads[0].clone()
    bad[3, 3] = math.nan
    results = []
    for sequence in (grads, [*grads[:4], bad, *grads[4:]]):
        param = parameter(32, 48, dtype=torch.bfloat16)
        optimizer = Apollo([("w", param)], lr=1e-3, rank=8, refresh_steps=3)
        run(optimizer, param, sequence)
        results.append(snapshot(optimizer, param))
    assert identical(*results)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
def test_a_strided_view_is_written_in_place_and_like_a_parameter_of_its_own(rounding, monkeypatch):
    monkeypatch.setattr(apollo_cpu, "has_bf16_units", lambda: False)  # else its own, contiguous, is rounded
    storage = randn(40, 64, scale=0.02).bfloat16()
    views = {"rows": storage[::2, :32], "columns": storage[:, 33:57].T, "vector": storage[:, 60]}
    around = torch.ones(40, 64, dtype=torch.bool)
    around[::2, :32] = around[:, 33:57] = around[:, 60] = False
    untouched, address = storage[around].clone(), storage.data_ptr()
    viewed = {name: torch.nn.Parameter(view) for name, view in views.items()}
    own = {
        name: torch.nn.Parameter(view.clone(memory_format=torch.contiguous_format))
        for name, view in views.items()
    }
    assert not any(p.is_contiguous() for p in viewed.values())
    assert all(p.is_contiguous() for p in own.values())
    for params in (viewed, own):
        optimizer = Apollo(params.items(), lr=1e-3, rank=8, rounding=rounding, limiter_ratio=0)
        for i in range(3):
            for p in params.values():
                p.grad = randn(*p.shape, seed=i).bfloat16()
            optimizer.step()
    for name, p in own.items():
        assert torch.equal(views[name], p.data)
        assert views[name].data_ptr() == viewed[name].data_ptr()
    assert storage.data_ptr() == address
    assert torch.equal(storage[around], untouched)


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16)).to(dtype)


def test_the_optimizer_in_backward_gives_what_an_explicit_step_gives():
    results = []
    for in_backward in (False, True):
        model = tiny_model(torch.bfloat16)
        optimizer = Apollo(model.named_parameters(), lr=1e-2, rank=8)
        if in_backward:  # as step.py does
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(optimizer.update_parameter)
        for i in range(5):
            model(randn(6, 24, seed=i).bfloat16()).square().sum().backward()
            if in_backward:
                optimizer.flush()
                assert all(p.grad is None for p in model.parameters())
            else:
                optimizer.step()
        results.append(snapshot(optimizer, *model.parameters()))
    assert identical(*results)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
def test_an_fp32_parameter_with_a_bf16_checkpoint_stays_on_the_bf16_grid(rounding):
    param = torch.nn.Parameter(randn(48).bfloat16().float())
    optimizer = Apollo([("A_log", param)], lr=1e-2, rounding=rounding, grid_dtypes={"A_log": torch.bfloat16})
    start = param.data.clone()
    run(optimizer, param, [randn(48, seed=i) for i in range(5)])
    assert param.dtype == torch.float32
    assert torch.equal(param.data, param.data.bfloat16().float())
    assert not torch.equal(param.data, start)


def test_stochastic_rounding_and_kahan_learn_what_nearest_drops():
    moved = {}
    for rounding in ("stochastic", "nearest", "kahan"):
        param = torch.nn.Parameter(torch.full((64, 64), 0.02).bfloat16())
        optimizer = Apollo([("w", param)], lr=1e-5, rank=16, rounding=rounding, limiter_ratio=0)
        run(optimizer, param, [torch.ones(64, 64)] * 20)
        moved[rounding] = (0.02 - param.double()).mean().item()
    fp32 = torch.nn.Parameter(torch.full((64, 64), 0.02))
    run(Apollo([("w", fp32)], lr=1e-5, rank=16, limiter_ratio=0), fp32, [torch.ones(64, 64)] * 20)
    expected = (0.02 - fp32.double()).mean().item()
    offset = 0.02 - torch.tensor(0.02).bfloat16().item()
    assert moved["nearest"] == offset
    # An element's sum of 20 roundings has a sigma below sqrt(20) / 2 bf16 steps of 1.22e-4: 4 sigma of the
    # mean of 4096.
    assert abs(moved["stochastic"] - offset - expected) < 4 * math.sqrt(20) / 2 * 1.22e-4 / 64
    # Kahan: off by what is still owed, at most half a step of 1.22e-4.
    assert abs(moved["kahan"] - offset - expected) < 0.61e-4 + 1e-6


def test_the_learning_rate_and_weight_decay_may_change_between_steps():
    param = parameter(32, 32)
    optimizer = Apollo([("w", param)], lr=0.0, rank=8)
    start = param.data.clone()
    run(optimizer, param, [randn(32, 32)])
    assert torch.equal(param.data, start)
    optimizer.lr, optimizer.weight_decay = 0.5, 0.5
    run(optimizer, param, [torch.zeros(32, 32)])
    assert torch.allclose(param.data, start * 0.75)  # a zero gradient: only decay
    optimizer.param_groups[0]["lr"] = 0.0
    start = param.data.clone()
    run(optimizer, param, [randn(32, 32)])
    assert torch.equal(param.data, start)
