"""Parameters that are updated together, what is kept between steps, and what is compiled before the first."""

import math
import subprocess
import sys

import pytest
import torch
from apollo_reference import randn
from apollo_worker.optimizer import cpu as apollo_cpu
from apollo_worker.optimizer.apollo import Apollo

from apollo_ipc.errors import UserError

torch.set_num_threads(2)


# --- small parameters together ---

MIXED = {"tall": (96, 40), "wide": (24, 200), "norm": (96,), "square": (64, 64), "scalar": (), "low": (4, 90)}


def mixed(kind, **options):
    params = {
        name: torch.nn.Parameter(randn(*shape, seed=i, scale=0.02).bfloat16())
        for i, (name, shape) in enumerate(MIXED.items())
    }
    return params, Apollo(params.items(), lr=1e-2, rank=16, projection=kind, backend="numba", **options)


def give_gradients(params, seed):
    for i, param in enumerate(params.values()):
        param.grad = randn(*param.shape, seed=100 * seed + i).bfloat16()


def everything(params, optimizer):
    tensors = [p.data for p in params.values()] + list(optimizer.state_tensors().values())
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("kind", ["gaussian", "block_sign"])
def test_parameters_that_wait_for_one_another_are_updated_as_each_alone(kind):
    together, alone = mixed(kind), mixed(kind)
    for i in range(3):
        for params, optimizer in (together, alone):
            give_gradients(params, i)
            for param in params.values():
                optimizer.update_parameter(param)
                if optimizer is alone[1]:
                    optimizer.flush()
        before = everything(*together)
        together[1].flush()
        assert not any(map(torch.equal, before[: len(MIXED)], everything(*together)))
    assert all(map(torch.equal, everything(*together), everything(*alone)))


def test_a_large_gradient_waits_for_nothing_and_small_ones_only_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(apollo_cpu, "CPU_HELD_ELEMENTS", 5000)
    params, optimizer = mixed("gaussian")
    before = {name: param.data.clone() for name, param in params.items()}

    def changed():
        return {name for name, param in params.items() if not torch.equal(param, before[name])}

    give_gradients(params, 0)
    optimizer.update_parameter(params["tall"])  # 3,840
    assert not changed()
    optimizer.update_parameter(params["wide"])  # 4,800
    assert changed() == {"tall", "wide"}
    optimizer.update_parameter(params["norm"])
    monkeypatch.setattr(apollo_cpu, "CPU_HELD_ELEMENTS", 4000)
    optimizer.update_parameter(params["square"])  # 4,096
    assert changed() == {"tall", "wide", "square"}
    optimizer.flush()
    assert changed() == {"tall", "wide", "square", "norm"}


def test_what_stops_one_write_stops_the_step_and_nothing_waits_after_it():
    num_allowed = 2

    def before_write():
        nonlocal num_allowed
        num_allowed -= 1
        if num_allowed < 0:
            raise UserError("vLLM has ended")

    params, optimizer = mixed("block_sign", before_write=before_write)
    before = [param.data.clone() for param in params.values()]
    give_gradients(params, 0)
    with pytest.raises(UserError, match="vLLM has ended"):
        optimizer.step()
    after = [param.data.clone() for param in params.values()]
    assert sum(map(torch.equal, before, after)) == len(MIXED) - 2
    optimizer.flush()
    assert all(map(torch.equal, after, params.values()))


def test_gradients_that_are_dropped_are_in_no_later_step():
    (params, optimizer), (others, other) = mixed("gaussian"), mixed("gaussian")
    give_gradients(params, 0)
    for param in params.values():
        optimizer.update_parameter(param)
    optimizer.drop()
    for some, one in ((params, optimizer), (others, other)):
        give_gradients(some, 1)
        one.step()
    assert all(map(torch.equal, everything(params, optimizer), everything(others, other)))


def test_a_bad_gradient_among_others_is_left_out_alone_and_counted():
    params, optimizer = mixed("gaussian")
    before = [param.data.clone() for param in params.values()]
    give_gradients(params, 0)
    for name in ("wide", "norm"):
        params[name].grad.view(-1)[-1] = math.nan
    optimizer.step()
    left_out = [
        n for n, old, new in zip(params, before, params.values(), strict=True) if torch.equal(old, new)
    ]
    assert left_out == ["wide", "norm"]
    assert optimizer.take_bad_updates() == 2


@pytest.mark.parametrize("kind", ["gaussian", "block_sign"])
def test_a_projection_is_made_once_for_all_steps_until_it_is_refreshed(kind, monkeypatch):
    made, real = [], apollo_cpu.NumbaBackend._make_sketch
    monkeypatch.setattr(
        apollo_cpu.NumbaBackend, "_make_sketch", lambda *args: made.append(args[1].name) or real(*args)
    )
    params, optimizer = mixed(kind, refresh_steps=3)
    for i in range(7):  # refreshes after 3 and 6
        give_gradients(params, i)
        optimizer.step()
    assert sorted(made) == sorted(3 * ["tall", "wide", "square"])


# --- compiling before the first step ---

# In a process of its own, where nothing is compiled yet: prints what the warm-up and each step compiled.
WARM_UP = """
import itertools
import torch
from apollo_worker.optimizer import cpu_kernels, cpu_threads, cpu_write
from apollo_worker.optimizer.apollo import Apollo

torch.set_num_threads(2)
cpu_threads.MIN_PART_ELEMENTS = 2**17  # the largest of the shapes is shared out
dispatchers = {**vars(cpu_kernels), **vars(cpu_write)}
dispatchers = {name: d for name, d in dispatchers.items() if hasattr(d, "signatures")}

def compiled():
    return {(name, str(signature)) for name, d in dispatchers.items() for signature in d.signatures}

choices = [["gaussian", "block_sign"], [8, 1], ["stochastic", "nearest", "kahan"]]
for projection, rank, rounding in itertools.product(*choices):
    for dtype in (torch.bfloat16, torch.float32):
        shapes = [(24, 40), (40, 24), (300, 1031), (24,)]
        params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
        options = {"projection": projection, "rank": rank, "rounding": rounding, "lr": 1e-3}
        optimizer = Apollo([(str(i), p) for i, p in enumerate(params)], **options)
        before = [t.clone() for t in (*params, *optimizer.state_tensors().values())]
        optimizer.warm_up()
        warm = compiled()
        assert all(map(torch.equal, before, (*params, *optimizer.state_tensors().values())))
        for param in params:
            param.grad = torch.randn(param.shape).to(dtype)
            optimizer.step()  # alone: among others it would be one thread's
        assert compiled() == warm, (options, dtype, compiled() - warm)
print(*sorted(name for name, d in dispatchers.items() if not d.signatures))
"""


def test_a_warm_up_compiles_every_kernel_of_a_step_and_changes_nothing():
    done = subprocess.run([sys.executable, "-c", WARM_UP], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # Parts of other kernels, compiled within them; all else of the file is used by some step.
    assert done.stdout.split() == [
        "_if_below_largest",
        "_mix",
        "_row_at",
        "_scale_of",
        "_scales",
        "_to_nearest",
    ]
