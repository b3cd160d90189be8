"""cpu_products.py: products of bf16 where the CPU has no instructions for them."""

import os
import subprocess
import sys

import pytest
import torch

from apollo_ipc import cpu_products
from apollo_ipc.cpu_products import addmm, bmm, linear, mm

BF16 = torch.bfloat16
# The longest dimension first, in the middle, last; one block, several, a last one that is shorter; none.
SHAPES = [(5, 3, 4), (300, 7, 9), (8, 301, 5), (6, 10, 299), (40, 40, 40), (0, 3, 4), (3, 0, 4), (1, 1, 1)]


def made(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """bf16 keeps 8 bits: a rounding is off by 2**-9 of the value, 2**-8 at a power of two. fp32's sums of at
    most 301 terms up to 10 are off by 301 * 2**-24 * 10 beside, which matters near 0."""
    assert found.dtype == BF16
    assert found.shape == exact.shape
    assert torch.all((found.double() - exact).abs() <= exact.abs() * 2**-8 + 2e-4)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cpu_products, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(cpu_products, "NARROW", 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_the_exact_one_rounded_once(shape, turned):
    m, k, n = shape
    a, b = made(m, k), made(n, k, seed=1).T if turned else made(k, n, seed=1)
    assert_rounded(mm(a, b), a.double() @ b.double())
    bias = made(n, seed=2)
    assert_rounded(addmm(bias, a, b), bias.double() + a.double() @ b.double())
    assert_rounded(addmm(bias, a, b, beta=0.5, alpha=2), 0.5 * bias.double() + 2 * (a.double() @ b.double()))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_batch_of_products_is_each_of_them(size):
    a, b = made(size, 9, 11), made(size, 11, 5, seed=1)
    assert_rounded(bmm(a, b), a.double() @ b.double())


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layers_product_is_the_exact_one_rounded_once_and_a_few_rows_are_torchs(monkeypatch, has_bias):
    monkeypatch.setattr(cpu_products, "has_bf16_units", lambda: False)
    monkeypatch.setattr(cpu_products, "NARROW", 6)
    x, weight, bias = made(2, 3, 11), made(5, 11, seed=1), made(5, seed=2) if has_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_rounded(linear(x, weight, bias), exact)
    few = x[0]
    assert torch.equal(linear(few, weight, bias), torch.nn.functional.linear(few, weight, bias))
    assert linear(x[:, :0], weight, bias).shape == (2, 0, 5)
    assert torch.equal(
        linear(x.float(), weight.float()), torch.nn.functional.linear(x.float(), weight.float())
    )


def test_memory_that_is_kept_serves_inference_mode_and_what_comes_after(monkeypatch):
    monkeypatch.setattr(cpu_products, "_scratch", cpu_products._Scratch())
    a, b = made(20, 30), made(30, 25, seed=1)
    with torch.inference_mode():
        first = mm(a, b)
    assert torch.equal(mm(a, b), first)


def test_the_compiler_takes_a_layers_product_whole():
    """vLLM compiles the forward pass unless it is told --enforce-eager, and refuses one that is in parts."""
    x, weight = made(20, 11), made(5, 11, seed=1)
    compiled = torch.compile(linear, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(x, weight), torch.nn.functional.linear(x, weight))


def test_what_a_factor_of_0_leaves_out_does_not_count():
    nothing = torch.full((4,), torch.nan, dtype=BF16)
    assert addmm(nothing, made(3, 2), made(2, 4), beta=0).isfinite().all()


def test_fp32_is_torchs_own_to_the_bit():
    a, b, bias = (made(*shape, dtype=torch.float32) for shape in ((50, 20), (20, 30), (30,)))
    assert torch.equal(mm(a, b), torch.mm(a, b))
    assert torch.equal(addmm(bias, a, b, beta=2), torch.addmm(bias, a, b, beta=2))
    assert torch.equal(bmm(a[None], b[None]), torch.bmm(a[None], b[None]))


def test_a_linear_layer_and_its_gradients_go_through_it_where_it_is_needed_and_nowhere_else():
    """In processes of their own: what is replaced stays so."""
    assert count_converted(has_units=True, has_products=True) == ["0", "0", "0"]
    # Attention's product is oneDNN's, and what is narrow.
    assert count_converted(has_units=False, has_products=True) == ["0", "3", "3"]
    assert count_converted(has_units=False, has_products=False) == ["3", "6", "7"]


def count_converted(has_units: bool, has_products: bool) -> list[str]:
    """After a narrow layer and its gradients, after a wide one, after a batch of products."""
    code = f"""
import torch
from apollo_ipc import cpu_products
calls = []
product, bmm = cpu_products._product, cpu_products.bmm
cpu_products._product = lambda *given: calls.append(1) or product(*given)
cpu_products.bmm = lambda *given: calls.append(1) or bmm(*given)
cpu_products.has_bf16_units = lambda: {has_units}
cpu_products.has_bf16_products = lambda: {has_products}
for _ in range(2):
    cpu_products.convert_where_needed()
for width in (8, 64):
    x = torch.randn(2, width, width).bfloat16().requires_grad_()
    layer = torch.nn.Linear(width, width, bias=False).bfloat16()
    layer(x).float().square().sum().backward()
    layer.float()(x.float()).square().sum()
    print(len(calls))
torch.bmm(x.detach(), x.detach())
print(len(calls))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()
