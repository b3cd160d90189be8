"""The compiled update against the plain one: the same random bits, the same rounding, the same refusals."""

import math

import numpy as np
import pytest
import torch
from apollo_reference import CPU, randn, run
from apollo_worker.optimizer import cpu as apollo_cpu
from apollo_worker.optimizer.apollo import Apollo
from apollo_worker.optimizer.backend import choose_backend
from apollo_worker.optimizer.projection import Draw, block_sign, dense
from apollo_worker.optimizer.update import TorchBackend, write

from apollo_ipc.errors import UserError

torch.set_num_threads(2)
numba_backend = apollo_cpu.NumbaBackend()


def twins(shape, dtype, **options):
    """(parameter, optimizer) of both backends, alike in everything else."""
    for backend in ("torch", "numba"):
        param = torch.nn.Parameter(randn(*shape, scale=0.02).to(dtype))
        yield param, Apollo([("w", param)], backend=backend, **options)


# Odd sizes: pairs of random bits that begin in the middle of a row, columns beside the last whole tile, a
# smaller dimension that the rank does not divide, rows longer than a segment and of a prime length.
SHAPES = [(24, 48), (48, 24), (33, 70), (129, 31), (40, 1031), (520, 2050), (300, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection_kind", ["gaussian", "block_sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_backends_compute_the_same_update(shape, projection_kind, dtype, monkeypatch):
    monkeypatch.setattr(apollo_cpu, "has_bf16_units", lambda: False)
    options = {"lr": 1e-2, "rank": 12, "weight_decay": 0.1, "refresh_steps": 2}
    (a, plain), (b, fast) = twins(shape, dtype, projection=projection_kind, rounding="nearest", **options)
    for i in range(4):
        grad = randn(*shape, seed=i, scale=1 + 5 * (i % 2))
        run(plain, a, [grad])
        run(fast, b, [grad])
    for key, expected in plain.state_tensors().items():
        # Sums of up to 520 products in another order: some 1e-6 of the largest.
        torch.testing.assert_close(
            fast.state_tensors()[key], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    # Scales that differ by 1e-5 differ in what they move by as much, and move a few weights of bf16 to the
    # neighbouring number: 2^-7 of themselves for each of four steps, as they may cancel afterwards.
    largest_move = float((a.detach().float() - randn(*shape, scale=0.02)).abs().max())
    atol = 1e-4 * largest_move if dtype == torch.float32 else 4 * 2**-7 * 0.05
    torch.testing.assert_close(b, a, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=atol)
    if dtype == torch.bfloat16:
        assert (a != b).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(96, 1000), (1000, 96)])
def test_a_product_in_bf16_changes_the_moments_by_its_rounding_only(shape, monkeypatch):
    monkeypatch.setattr(apollo_cpu, "has_bf16_units", lambda: True)
    (a, plain), (b, fast) = twins(shape, torch.bfloat16, lr=1e-2, rank=64, rounding="nearest")
    for i in range(3):
        grad = randn(*shape, seed=i)
        run(plain, a, [grad])
        run(fast, b, [grad])
    expected, found = plain.state_tensors(), fast.state_tensors()
    # bf16 is off by up to 2^-8, in the root mean square by some 2^-7 / sqrt(12) / 1.44 = 0.0016. P and R both
    # are, independently: m by 0.0022, R^2 by twice that, of which the mean over steps leaves some. An error
    # in the product would be of order 1.
    for key, bound in (("exp_avg", 0.004), ("exp_avg_sq", 0.006), ("update_norm", 0.004)):
        for name in (name for name in expected if name.endswith(key)):
            off = (found[name] - expected[name]).norm() / expected[name].norm()
            assert 0 < off < bound
    assert all(tensor.dtype != torch.bfloat16 for tensor in found.values())
    # Scales some 0.1 % apart: what was moved by 0.03 ends at most at the neighbouring number of bf16.
    torch.testing.assert_close(b, a, rtol=2**-7, atol=3 * 2**-7 * 0.03)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
@pytest.mark.parametrize("shape", [*SHAPES, (1031,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_bit_identical_given_the_same_scales(rounding, shape, dtype):
    """One scale of exactly 1 for every channel: no sum is involved, so no last bit may differ."""
    (a, plain), (b, fast) = twins(shape, dtype, lr=3e-4, rank=4, rounding=rounding)
    ones = np.ones(max(shape, default=1), np.float32)
    for i in range(3):
        grad = randn(*shape, seed=i).to(dtype)
        for param, optimizer in ((a, plain), (b, fast)):
            optimizer.state[param]["step"].fill_(i)
        hyper, state = plain._hyper("w", a), plain.state[a]
        rows = torch.atleast_1d(grad).float()
        write(a.data, lambda part, rows=rows: rows[part], torch.tensor(True), state, hyper)
        arrays = numba_backend._arrays_of(b.data, fast.state[b])
        G = apollo_cpu._rows(grad if grad.dim() == 2 else grad.reshape(1, -1))
        scale = ones if grad.dim() == 2 else ones[:1]
        part = apollo_cpu._part_length(G.shape[1])
        numba_backend._write(apollo_cpu._to_write(arrays, G, scale, hyper, part), hyper)
    assert torch.equal(a, b)
    if rounding == "kahan":
        assert torch.equal(plain.state[a]["compensation"], fast.state[b]["compensation"])


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
@pytest.mark.parametrize("shape", [(576,), (1,), (3, 5, 7), (2, 1031), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_of_a_vector_is_the_plain_one_up_to_the_last_bit_of_a_root(rounding, shape, dtype):
    (a, plain), (b, fast) = twins(shape, dtype, lr=1e-2, rank=64, rounding=rounding)
    assert plain.fallbacks() == ["w"]
    for i in range(4):
        grad = randn(*shape, seed=i, scale=10.0 ** (i - 2))
        run(plain, a, [grad])
        run(fast, b, [grad])
    assert not torch.equal(a, randn(*shape, scale=0.02).to(dtype))
    found = fast.state_tensors()
    for key, expected in plain.state_tensors().items():
        assert torch.equal(found[key], expected) or key == "w.compensation", key
    # Torch's roots are off by 2^-23 of themselves at most, so updates are, each of some 1e-2. What that
    # changes of an fp32 weight is its last bit, and rarely the direction in which one of bf16 is rounded;
    # what is owed then makes up for it but for its own last bit, 2^-16 of the weight.
    owed = [x.get("w.compensation", torch.zeros(())).float() for x in (plain.state_tensors(), found)]
    whole = [p.detach().float() + o for p, o in zip((a, b), owed, strict=True)]
    if rounding == "kahan" or dtype == torch.float32:
        torch.testing.assert_close(
            whole[1], whole[0], rtol=2**-15 if dtype == torch.bfloat16 else 0, atol=3e-8
        )
    else:
        torch.testing.assert_close(whole[1], whole[0], rtol=2**-7, atol=0)
        assert (a != b).float().mean() < 0.01


@pytest.mark.parametrize("value", [3.3895e38, -3.3895e38, math.inf, -math.inf, math.nan, -0.0])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
def test_the_ends_of_the_grid_are_as_in_the_plain_update(value, rounding):
    (a, plain), (b, fast) = twins((16, 16), torch.bfloat16, lr=1e-3, rank=4, rounding=rounding)
    for param, optimizer in ((a, plain), (b, fast)):
        param.data[3, 5] = value
        run(optimizer, param, [randn(16, 16)])
    as_bits = [p.data[3, 5].view(torch.int16).item() for p in (a, b)]
    assert as_bits[0] == as_bits[1] or (a[3, 5].isnan() and b[3, 5].isnan())


@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
@pytest.mark.parametrize("projection_kind", ["gaussian", "block_sign"])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_what_is_not_finite_changes_nothing(bad, projection_kind, shape):
    _, (param, optimizer) = twins(shape, torch.bfloat16, lr=1e-3, rank=10, projection=projection_kind)
    run(optimizer, param, [randn(*shape)])
    before = [param.data.clone(), *(t.clone() for t in optimizer.state_tensors().values())]
    grad = randn(*shape, seed=1)
    grad[-1, -1] = bad
    run(optimizer, param, [grad])
    after = [param.data, *optimizer.state_tensors().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert optimizer.take_bad_updates() == 1


def test_threads_share_a_large_parameter_and_change_nothing(monkeypatch):
    results = []
    for least in (2**30, 1000):
        monkeypatch.setattr("apollo_worker.optimizer.cpu_threads.MIN_PART_ELEMENTS", least)
        for kind in ("gaussian", "block_sign"):
            param = torch.nn.Parameter(randn(300, 700).bfloat16())
            optimizer = Apollo([("w", param)], lr=1e-3, rank=16, projection=kind, backend="numba")
            run(optimizer, param, [randn(300, 700, seed=1)])
            results.append(param.data.clone())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize(
    ("kind", "rank"), [("gaussian", 7), ("gaussian", 64), ("block_sign", 7), ("block_sign", 64)]
)
def test_the_compiled_sketch_is_the_plain_one(kind, rank):
    draw = Draw(kind, 3, "a.weight", torch.tensor(5), 333, rank, CPU)
    mine, theirs = dense(numba_backend.sketch(draw)(torch.float32)), dense(TorchBackend().sketch(draw))
    if kind == "block_sign":
        assert torch.equal(mine, theirs)
    else:  # logarithms and cosines of fp32, each right to a few units in the last place; |P| < 6 / sqrt(r)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=6e-6 / math.sqrt(rank))


# --- the block-sign sketch ---


def test_a_block_sign_sketch_has_one_sign_a_row_and_columns_of_equal_size():
    P = block_sign(0, "w", 0, 1000, 64, CPU).dense()
    assert torch.equal(P.abs().sum(dim=1), torch.ones(1000))
    assert set(P.abs().sum(dim=0).tolist()) == {15.0, 16.0}
    # 1000 signs: sigma of their sum is 32.
    assert abs(P.sum().item()) < 4 * math.sqrt(1000)
    other = block_sign(0, "w", 1, 1000, 64, CPU).dense()
    assert not torch.equal(P, other)
    assert torch.equal(other, block_sign(0, "w", torch.tensor(1), 1000, 64, CPU).dense())


def test_block_sign_keeps_the_norm_in_the_mean_over_draws():
    """E|R|^2 = |G|^2 with variance 2 (|G|^4 - sum G^4) / r at most: 400 draws, 4 sigma."""
    G, rank, num = randn(96, seed=1), 8, 400
    ratios = torch.tensor(
        [
            float((G @ block_sign(0, "w", i, 96, rank, CPU).dense()).square().sum() / G.square().sum())
            for i in range(num)
        ]
    )
    assert abs(ratios.mean() - 1) < 4 * math.sqrt(2 / rank / num)
    assert ratios.var() < 1.5 * 2 / rank


@pytest.mark.parametrize("pattern", ["equal", "alternating", "pairs", "heads"])
def test_coherent_channels_do_not_cancel_in_a_block_sign_sketch(pattern):
    """Neighbours that are alike, or opposite, make a plain block sum too large, or zero."""
    k, rank = 1024, 64
    G = {
        "equal": torch.ones(k),
        "alternating": torch.ones(k) * torch.tensor([1.0, -1.0]).repeat(k // 2),
        "pairs": torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(k // 4),
        "heads": torch.nn.functional.one_hot(torch.arange(k) % 64, 64)[:, 5].float(),
    }[pattern]
    if pattern == "heads":  # one loud feature in each: without the rotations they all meet
        plain = G.view(k // rank, rank).sum(dim=0).square().sum() / G.square().sum()
    else:
        plain = G.view(rank, k // rank).sum(dim=1).square().sum() / G.square().sum()
    assert plain == pytest.approx(16 if pattern in ("equal", "heads") else 0)
    ratios = []
    for seed in range(20):
        ratio = (G @ block_sign(seed, "w", 0, k, rank, CPU).dense()).square().sum() / G.square().sum()
        ratios.append(float(ratio))
        assert abs(ratio - 1) < 5 * math.sqrt(2 / rank)  # 0.88; 20 draws within 5 sigma
    assert abs(sum(ratios) / 20 - 1) < 4 * math.sqrt(2 / rank / 20)


# --- the limiter's norm ---


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("kind", ["gaussian", "block_sign"])
def test_the_limiters_norm_is_within_a_few_percent_of_the_updates(backend, kind):
    param = torch.nn.Parameter(torch.zeros(512, 640))
    options = {"projection": kind, "limiter_ratio": 0, "backend": backend}
    optimizer = Apollo([("w", param)], lr=1.0, **options)
    for i in range(3):
        before = param.data.clone()
        run(optimizer, param, [randn(512, 640, seed=i)])
    norm = optimizer.state_tensors()["w.update_norm"].item()
    # s_j holds 1 / |R_j|, so the estimate is low by about sqrt(r / (r - 2)) = 1.6 % at rank 64.
    assert 0.95 < norm / (param.data - before).norm().item() < 1.01


# --- choosing ---


def test_without_numba_the_plain_update_runs_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "apollo_worker.optimizer.cpu", None)
    assert isinstance(choose_backend("cpu"), TorchBackend)
    assert "slow" in caplog.text
    with pytest.raises(ImportError):
        choose_backend("cpu", "numba")


def test_a_backend_of_another_device_is_refused_by_name():
    with pytest.raises(UserError, match="triton does not run on cpu"):
        choose_backend("cpu", "triton")


def test_a_strided_weight_is_left_to_the_plain_update():
    merged = torch.zeros(64, 48, dtype=torch.bfloat16)
    results = []
    for backend in ("torch", "numba"):
        merged.copy_(randn(64, 48))
        param = torch.nn.Parameter(merged.T[:, 10:50])
        run(Apollo([("w", param)], lr=1e-3, rank=8, backend=backend), param, [randn(48, 40, seed=1)])
        results.append(merged.clone())
    assert torch.equal(*results)
