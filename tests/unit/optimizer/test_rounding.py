"""Rounding to bf16 and fp16: unbiased, exact where it can be, and reproducible from (seed, step, element)."""

import math

import pytest
import torch
from apollo_worker.optimizer.rounding import (
    grid_within,
    hash_bits,
    kahan_add,
    nearest_round,
    stochastic_round,
)

torch.set_num_threads(2)
CPU = torch.device("cpu")
LOW = [torch.bfloat16, torch.float16]


def murmur3_finalizer(h):
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def reference_hash(element, seed, step):
    key = murmur3_finalizer((step + 0x5BD1E995) % 2**32)
    key = murmur3_finalizer(murmur3_finalizer(key ^ seed % 2**32) ^ (seed >> 32))
    second = murmur3_finalizer((key + 0x5BD1E995) % 2**32)
    return murmur3_finalizer(murmur3_finalizer(element % 2**32 ^ key) ^ second)


def every_finite(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[torch.isfinite(values)]


def neighbours(x, dtype):
    """Grid values just at or below and above each x, by search in the sorted grid."""
    grid = every_finite(dtype).double().unique()
    above = torch.searchsorted(grid, x.double(), right=True).clamp(1, len(grid) - 1)
    return grid[above - 1], grid[above]


def test_the_hash_is_murmur3s_finalizer_in_wrapping_integers():
    seed, step, first = 0xFEDCBA9876543210, 2**31 + 7, 2**32 - 3
    expected = [reference_hash(first + i, seed, step) for i in range(50)]
    got = hash_bits(50, seed, step, first=first, device=CPU)
    assert [int(h) % 2**32 for h in got] == expected
    assert torch.equal(got, hash_bits(50, seed, torch.tensor(step), first=first, device=CPU))


def test_each_bit_of_the_hash_is_fair_and_steps_and_seeds_are_unrelated():
    num = 1 << 16
    draws = [hash_bits(num, seed, step, device=CPU) for seed, step in [(0, 0), (0, 1), (1, 0), (2**40, 0)]]
    bits = torch.stack([(draw[:, None] >> torch.arange(32)) & 1 for draw in draws]).double()
    # 4 draws * 32 bits, each a mean of num fair coins: sigma = 0.5 / sqrt(num); 5 sigma for 128 looks.
    assert ((bits.mean(dim=1) - 0.5).abs() < 5 * 0.5 / math.sqrt(num)).all()
    for i in range(4):
        for j in range(i):
            agreement = (bits[i] == bits[j]).double().mean(dim=0)
            assert ((agreement - 0.5).abs() < 5 * 0.5 / math.sqrt(num)).all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("step", [0, 1, 12345])
def test_every_value_of_the_grid_stays_exactly_what_it_is(dtype, step):
    values = every_finite(dtype)  # -0.0, all subnormals and both largest values among them
    rounded = stochastic_round(values.float(), dtype, seed=3, step=step)
    assert torch.equal(rounded.view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize("dtype", LOW)
def test_a_value_goes_to_one_of_its_two_neighbours_only(dtype):
    generator = torch.Generator().manual_seed(0)
    exponent = torch.rand(20_000, generator=generator) * 36 - 26  # fp16's subnormals up to beyond 1
    x = torch.randn(20_000, generator=generator) * 2.0**exponent
    below, above = neighbours(x, dtype)
    rounded = stochastic_round(x, dtype, seed=5, step=9).double()
    assert ((rounded == below) | (rounded == above)).all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("value", [0.0200113, -0.0200113, 1.9999, 1e-5, -3.1e-7, 6.0977e-5, 60010.3])
def test_the_mean_of_many_roundings_is_the_value(dtype, value):
    num = 200_000
    x = torch.full((num,), value)
    below, above = neighbours(x[:1], dtype)
    share = ((x[0].double() - below) / (above - below)).item()
    sigma = (above - below).item() * math.sqrt(share * (1 - share) / num)
    # 4 sigma, and the grain of the random numbers: 2^-13 of a grid step is the coarser one.
    for step in range(3):
        mean = stochastic_round(x, dtype, seed=11, step=step).double().mean()
        assert abs(mean - x[0].double()) <= 4 * sigma + (above - below).item() * 2.0**-13


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", LOW)
def test_finite_stays_finite_and_infinities_and_nan_pass_through(dtype, rounding):
    largest = torch.finfo(dtype).max
    x = torch.tensor(
        [torch.finfo(torch.float32).max, math.nextafter(largest, math.inf), largest * (1 + 2**-12)]
    )
    x = torch.cat([x, -x]).clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    for step in range(50):
        rounded = (
            stochastic_round(x, dtype, seed=1, step=step)
            if rounding == "stochastic"
            else nearest_round(x, dtype)
        )
        assert torch.equal(rounded.float(), torch.tensor([largest] * 3 + [-largest] * 3))
    nan_with_low_bits = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    special = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), nan_with_low_bits])
    rounded = (
        stochastic_round(special, dtype, seed=1, step=0)
        if rounding == "stochastic"
        else nearest_round(special, dtype)
    )
    assert rounded[0] == math.inf
    assert rounded[1] == -math.inf
    assert rounded[2:].isnan().all()


def test_rounding_in_parts_with_offsets_gives_what_rounding_at_once_gives():
    x = torch.randn(1001)
    whole = stochastic_round(x, torch.bfloat16, seed=2, step=4)
    for cut in (1, 2, 333, 1000):  # odd ones too: two elements share one hash
        parts = [
            stochastic_round(x[:cut], torch.bfloat16, seed=2, step=4),
            stochastic_round(x[cut:], torch.bfloat16, seed=2, step=4, offset=cut),
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_the_same_seed_and_step_give_the_same_result_and_others_do_not():
    x = torch.randn(4096)
    first = stochastic_round(x, torch.bfloat16, seed=2, step=4)
    assert torch.equal(first, stochastic_round(x, torch.bfloat16, seed=2, step=torch.tensor(4)))
    assert torch.equal(first.view(64, 64).T, stochastic_round(x.view(64, 64), torch.bfloat16, 2, 4).T)
    assert not torch.equal(first, stochastic_round(x, torch.bfloat16, seed=2, step=5))
    assert not torch.equal(first, stochastic_round(x, torch.bfloat16, seed=3, step=4))


def test_the_order_of_elements_is_logical_and_not_that_of_memory():
    x = torch.randn(30, 20)
    strided = x.T.contiguous().T
    assert torch.equal(
        stochastic_round(strided, torch.bfloat16, seed=2, step=4), stochastic_round(x, torch.bfloat16, 2, 4)
    )


def test_float32_is_left_alone():
    x = torch.randn(8)
    assert stochastic_round(x, torch.float32, seed=0, step=0) is x
    assert nearest_round(x, torch.float32) is x


def test_a_checkpoint_grid_coarser_than_the_storage_is_kept_and_a_finer_one_is_not():
    assert grid_within(torch.bfloat16, torch.float32) == torch.bfloat16
    assert grid_within(torch.float32, torch.bfloat16) == torch.bfloat16
    assert grid_within(torch.float32, torch.float32) == torch.float32


def test_kahan_reaches_a_sum_that_nearest_never_starts_on():
    update = torch.full((64,), 1e-5)  # bf16's step at 0.02 is 1.2e-4: each one alone is lost
    weight = nearest = torch.full((64,), 0.02).bfloat16()
    compensation = torch.zeros(64, dtype=torch.bfloat16)
    start = weight.double()
    for _ in range(1000):
        weight, compensation = kahan_add(weight.float(), compensation, update, torch.bfloat16)
        nearest = nearest_round(nearest.float() + update, torch.bfloat16)
    assert torch.equal(nearest.double(), start)
    # The buffer is bf16 too: each of 1000 additions to it may be wrong by 2^-9 of its size, which is at
    # most half a bf16 step of the weight (|w| < 0.03: 6.1e-5), all to one side at the very worst.
    worst = 1000 * 2.0**-9 * 6.1e-5
    assert ((weight.double() + compensation.double() - start - 1e-2).abs() < worst).all()
