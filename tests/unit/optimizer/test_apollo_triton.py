"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled for an H100.

The interpreter's switch is read when Triton is imported, so the checks run in processes of their own: this
file again, with functions that are called check_... or compile_... in the place of test_...
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from apollo_reference import CPU, randn
from apollo_worker.optimizer import update as apollo_update
from apollo_worker.optimizer.backend import choose_backend, why_nothing_compiles
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
    to_bytes,
    triton_backend,
    with_backend,
)

from apollo_ipc.errors import UserError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(
    ("kind", "interpret", "which"),
    [
        ("compile", "0", ""),
        pytest.param("check", "1", "not slow", marks=pytest.mark.slow),
        pytest.param("check", "1", "slow", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_pass_their_checks(kind, interpret, which, tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"python_functions={kind}_*"]
    env = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "-m", which, __file__], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def make_compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_c_compiler_the_plain_update_runs_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isinstance(choose_backend("cuda"), TorchBackend)
    assert "no C compiler: neither gcc nor clang is in PATH" in caplog.text
    assert "slow" in caplog.text
    with pytest.raises(UserError, match="no C compiler"):
        choose_backend("cuda", "triton")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_c_compiler_that_reads_pythons_header_is_enough_for_triton(monkeypatch, tmp_path, caplog, name):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    make_compiler(tmp_path / name, "exit 0")
    backend = choose_backend("cuda")
    assert type(backend).__name__ == "TritonBackend"
    assert not caplog.text


def test_a_compiler_without_pythons_header_or_that_cannot_be_run_is_named(monkeypatch, tmp_path, caplog):
    said = "<stdin>:1:10: fatal error: Python.h: No such file or directory"
    monkeypatch.setenv("CC", make_compiler(tmp_path / "headless", f"echo '{said}' >&2; exit 1"))
    assert isinstance(choose_backend("cuda"), TorchBackend)
    assert f"headless compiles no Python extension: {said}" in caplog.text
    monkeypatch.setenv("CC", str(tmp_path / "nowhere"))
    assert isinstance(choose_backend("cuda"), TorchBackend)
    assert "nowhere cannot be run: No such file or directory" in caplog.text


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_the_real_compiler_is_asked():
    assert why_nothing_compiles() is None or "Python.h" in str(why_nothing_compiles())


EVERYTHING = {
    "shape": [(24, 48), (48, 24), (33, 70), (70, 33), (1, 40), (5, 64), (37,), (), (6, 1, 4)],
    "rank": [1, 2, 8],
    "dtype": [torch.bfloat16, torch.float32],
    "projection": ["gaussian", "block_sign"],
    "rounding": ROUNDINGS,
    "weight_decay": [0.0, 0.1],
    "limiter_ratio": [0, 1.01],
}
CASES = random.Random(1).sample(list(itertools.product(*EVERYTHING.values())), 26)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def check_a_step_is_the_references(case):
    options = dict(zip(EVERYTHING, case, strict=True))
    shape, dtype = options.pop("shape"), options.pop("dtype")
    weight = randn(*shape, scale=0.02).to(dtype)
    options |= {"lr": 1e-3, "refresh_steps": 2, "betas": (0.5, 0.999), "limiter_floor": 0.01}
    reference, ours = (make(weight, b, **options) for b in (SameProjection(dtype), triton_backend()))
    norms = []
    for i in range(3):
        before = reference[0].detach().clone()
        # Thirty times the gradient: the limiter bites.
        grad = (randn(*shape, seed=i + 1) * [1, 1e-3, 30][i]).to(dtype)
        for made in (reference, ours):
            step(*made, grad.clone())
        assert_same_step(reference, ours, before)
        norms.append(ours[1].state_tensors().get("w.update_norm", torch.tensor(0.0)).item())
        ours[0].data.copy_(reference[0].data)  # so that each step begins with equals
        ours[1].load_state(reference[1].state_tensors(), reference[1].state_meta())
    if options["limiter_ratio"] and norms[0]:
        largest = 1.01 * max(norms[1], 0.01 * math.sqrt(weight.numel()))
        assert norms[2] == pytest.approx(largest, rel=1e-5), "the limiter did not bite"


def check_that_the_sample_of_cases_has_every_choice():
    for i, values in enumerate(EVERYTHING.values()):
        assert {case[i] for case in CASES} == set(values)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(24, 48), (70, 33)])
def check_what_is_written_is_the_references_bit_for_bit(shape, dtype, rounding):
    """With a given scale and without weight decay no sum is involved. fp32 weights here have bf16's grid."""
    from apollo_worker.optimizer.gpu import _Verdict, _write_weight

    weight = randn(*shape, scale=0.02).bfloat16().to(dtype)
    grad, scale_c = randn(*shape, seed=1).to(dtype), randn(max(shape), seed=2).abs() + 0.5
    largest = torch.finfo(torch.bfloat16).max
    weight.view(-1)[:3] = torch.tensor([largest, -largest, -0.0])
    grad.view(-1)[:3] = torch.tensor([-3e37, 3e37, 0.0])  # past bf16, within fp32: it saturates
    grids = {"w": torch.bfloat16}
    results = []
    for backend in ("torch", "triton"):
        param, optimizer = make(weight, lr=0.01, rank=8, rounding=rounding, grid_dtypes=grids)
        state, hyper = optimizer.state[param], optimizer._hyper("w", param)
        if "compensation" in state:
            state["compensation"].copy_(randn(*shape, seed=3, scale=1e-5))
        if backend == "torch":
            scale = (scale_c[:, None] if shape[0] >= shape[1] else scale_c[None, :]).expand(shape)
            D = grad.float() * scale
            apollo_update.write(param.data, lambda r, D=D: D[r], torch.tensor(True), state, hyper)
        else:
            state["step"] += 1
            ok, factor = torch.tensor(1, dtype=torch.int8), torch.tensor(1.0)
            _write_weight(param.data, grad, _Verdict(ok, ok, scale_c, factor), state, hyper)
        assert param.isfinite().all()
        results.append((to_bytes(param), to_bytes(state.get("compensation", param))))
    assert results[0] == results[1]


@pytest.mark.parametrize("step_", [0, 1, 199, 2**31 + 5])
def check_the_random_bits_are_those_of_rounding(step_):
    from apollo_worker.optimizer import gpu_kernels as triton_kernels
    from apollo_worker.optimizer.gpu import _halves

    for seed in (0, 1, BIG_SEED, 2**32 - 1):
        bits = torch.empty(1000, dtype=torch.int32)
        triton_kernels.hash_counters[(8,)](bits, torch.tensor(step_), *_halves(seed), 1000, BLOCK=128)
        assert torch.equal(bits, hash_bits(1000, seed, torch.tensor(step_), device=CPU))


@pytest.mark.parametrize(("k", "rank"), [(24, 8), (33, 7), (1, 1), (600, 3)])
def check_projections_are_those_of_projection(k, rank):
    arguments = (BIG_SEED, "w", torch.tensor(3), k, rank, CPU)
    make_P = triton_backend().sketch(Draw("gaussian", *arguments))
    P_kr = make_P(torch.float32)
    torch.testing.assert_close(P_kr, projection(*arguments), rtol=1e-6, atol=1e-6)  # last bits of log and cos
    assert torch.equal(make_P(torch.bfloat16), P_kr.bfloat16())
    for dtype in (torch.float32, torch.bfloat16):
        P_kr = triton_backend().sketch(Draw("block_sign", *arguments))(dtype)
        assert torch.equal(P_kr.float(), block_sign(*arguments).dense())


VIEWS = {  # of storage (40, 64)
    "rows": lambda t: t[5:29],
    "transposed": lambda t: t.T,
    "columns": lambda t: t[:, 33:57],
    "turned columns": lambda t: t[:, 33:57].T,
    "every other": lambda t: t[::2, ::3],
    "vector": lambda t: t[:, 60],
    "thin": lambda t: t[:3, 1:].T,
}


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("view", VIEWS)
def check_a_view_is_written_in_place_and_like_a_parameter_of_its_own(view, rounding):
    """The random bits go by an element's place in the tensor, not in memory."""
    storage = randn(40, 64, scale=0.02).bfloat16()
    around = torch.ones(40, 64, dtype=torch.bool)
    VIEWS[view](around)[:] = False
    untouched = storage[around].clone()
    options = {"lr": 1e-3, "rank": 8, "rounding": rounding}
    own, optimizer = make(VIEWS[view](storage).contiguous(), **options)
    viewed, of_view = with_backend(torch.nn.Parameter(VIEWS[view](storage)), None, **options)
    grads = [randn(*own.shape, seed=i).bfloat16() for i in (1, 2)]
    for made in ((own, optimizer), (viewed, of_view)):
        step(*made, grads[0])
    assert torch.equal(own, viewed)
    step(own, optimizer, grads[1])
    step(viewed, of_view, grads[1].mT.contiguous().mT if viewed.dim() == 2 else grads[1])
    # R sums the turned gradient in another order: see assert_same_step.
    assert (own != viewed).sum() <= 1 + own.numel() // 200
    assert torch.equal(storage[around], untouched)
    assert viewed.data_ptr() == VIEWS[view](storage).data_ptr()


def check_offsets_beyond_two_to_the_31_are_right():
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # 4 GiB of which two pages are touched
    far = storage.as_strided((2, 24), (2**31 + 32, 1))
    far.copy_(randn(2, 24, scale=0.02))
    options = {"lr": 1e-2, "rank": 2, "rounding": "nearest"}
    own, optimizer = make(far.contiguous(), **options)
    param, of_view = with_backend(torch.nn.Parameter(far), None, **options)
    for made in ((own, optimizer), (param, of_view)):
        step(*made, randn(2, 24, seed=1).bfloat16())
    assert torch.equal(own, far)


@pytest.mark.parametrize(("bad", "rounding"), zip([math.inf, math.nan, 3e38], ROUNDINGS, strict=True))
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (24,), (), (9000,)])
def check_a_gradient_that_is_not_finite_changes_nothing_at_all(shape, bad, rounding):
    options = {"lr": 1e-3, "rank": 8, "rounding": rounding}
    param, optimizer = make(randn(*shape, scale=0.02).bfloat16(), **options)
    step(param, optimizer, randn(*shape, seed=1).bfloat16())
    assert optimizer.take_bad_updates() == 0
    before = snapshot(param, optimizer)
    grad = randn(*shape, seed=2).bfloat16()
    grad.view(-1)[-1] = bad
    step(param, optimizer, grad)
    assert snapshot(param, optimizer) == before
    assert optimizer.take_bad_updates() == 1
    step(param, optimizer, randn(*shape, seed=3).bfloat16())
    assert snapshot(param, optimizer) != before


@pytest.mark.parametrize("rounding", ROUNDINGS)
def check_adam_by_several_programs_is_the_references(rounding):
    options = {"lr": 1e-3, "rank": 8, "rounding": rounding, "weight_decay": 0.1}
    weight = randn(3, 3001, scale=0.02).bfloat16()
    reference, ours = (make(weight, b, **options) for b in (TorchBackend(), triton_backend()))
    for made in (reference, ours):
        step(*made, randn(3, 3001, seed=1).bfloat16())
    assert_same_step(reference, ours, weight)


STACKS = {"tall": (3, 48, 24), "wide": (5, 33, 70), "thin": (4, 64, 7), "bias": (4, 37), "long": (3, 9000)}
OF_STACKS = list(
    itertools.product(
        STACKS, [torch.bfloat16, torch.float32], zip([1, 8, 8], ROUNDINGS, strict=True), [False, True]
    )
)
SOME_STACKS = random.Random(3).sample(OF_STACKS, 12)


def check_that_some_stacks_have_every_choice():
    for of_all, of_some in zip(zip(*OF_STACKS, strict=True), zip(*SOME_STACKS, strict=True), strict=True):
        assert set(of_some) == set(of_all)


@pytest.mark.parametrize(
    ("shape", "dtype", "update", "turned"),
    [pytest.param(*one, marks=[pytest.mark.slow] * (one not in SOME_STACKS)) for one in OF_STACKS],
)
def check_a_step_of_a_stack_is_the_references(shape, dtype, update, turned):
    """One of its experts is asked for nothing, then one has a gradient that is not finite."""
    rank, rounding = update
    weight = randn(*STACKS[shape], scale=0.02).to(dtype)
    if turned and weight.dim() == 3:
        weight = weight.mT.contiguous().mT
    options = {"lr": 1e-3, "rank": rank, "rounding": rounding, "weight_decay": 0.1, "stacks": ["w"]}
    reference, ours = (make(weight, b, **options) for b in (SameProjection(dtype), triton_backend()))
    for i in range(3):
        before = reference[0].detach().clone()
        grad = randn(*weight.shape, seed=i + 1).to(dtype)
        grad[i] = [0.0, math.nan, 0.0][i]
        steps = reference[1].state_tensors()["w.step"].clone()
        is_asked = torch.arange(len(grad)) != i
        for made in (reference, ours):
            step(*made, grad.clone())
            assert made[1].take_bad_updates() == (i == 1)
            assert torch.equal(made[0][i], before[i])
        assert_same_step(reference, ours, before)
        assert torch.equal(reference[1].state_tensors()["w.step"] - steps, is_asked.long())
        ours[0].data.copy_(reference[0].data)
        ours[1].load_state(reference[1].state_tensors(), reference[1].state_meta())


def check_fp16_is_left_to_the_reference():
    weight, grad = randn(24, 48, scale=0.02).half(), randn(24, 48, seed=1).half()
    reference, ours = (
        make(weight, b, lr=1e-3, rank=8) for b in (SameProjection(torch.float32), triton_backend())
    )
    for made in (reference, ours):
        step(*made, grad.clone())
    assert torch.equal(reference[0], ours[0])


def compile_every_launch_of_a_step(monkeypatch):
    """For compute capability 9.0, with the backend's own arguments: types, layouts and ptxas' own rules."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 26)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    launches, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self.__name__, compiled.asm["ptx"]))
        return compiled

    driver.set_active(NoDevice())
    monkeypatch.setattr(JITFunction, "run", compile_only)

    def launched(shape, *, dtype=torch.bfloat16, turned=False, **options):
        launches.clear()
        weight = torch.zeros(shape, dtype=dtype)
        made = make(weight.mT.contiguous().mT if turned else weight, triton_backend(), lr=1e-3, **options)
        step(*made, torch.zeros(shape, dtype=dtype))
        ptx = dict(launches)
        assert not any("atom." in text or "red.global" in text for text in ptx.values())
        assert not any("fma.rn.f32" in text for name, text in launches if name != "normals")
        # Whole rows are read and written 16 bytes at a time.
        if len(shape) == 2 and not any(n % 8 for n in shape):
            for name in {"write", "adam"} & ptx.keys():
                assert "ld.global.v4" in ptx[name], name
                assert "st.global.v4" in ptx[name], name
        return [name for name, _ in launches]

    moments = ["channel_stats", "verdict", "store_moments", "write"]
    assert launched((512, 1024), rank=64) == ["normals", *moments]
    launched((512, 1024), rank=64, rounding="kahan")
    launched((512, 1024), rank=64, turned=True)
    launched((70, 33), rank=5, dtype=torch.float32, projection="block_sign")
    launched((1, 40), rank=1, rounding="nearest", betas=(0, 0.99), alpha=1, limiter_ratio=0, weight_decay=1)
    assert launched((4, 512, 1024), rank=64, stacks=["w"]) == ["normals", *moments]
    launched((4, 512, 1024), rank=64, stacks=["w"], turned=True, rounding="kahan")
    assert launched((4, 1024), rank=64, stacks=["w"]) == ["adam"]
    assert launched((4, 48, 512), rank=64, stacks=["w"]) == ["adam", "adam"]
    assert launched((5120,)) == ["adam"]
    assert launched((48, 512), rank=64) == ["adam", "adam"]
    launched(())
