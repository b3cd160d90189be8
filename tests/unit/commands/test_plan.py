"""`apollo-ipc plan` against what a real step of the same model on this CPU allocates."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from apollo_worker.commands import memory_plan
from apollo_worker.commands.memory_plan import Request, has_compiled_update, plan
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.step import Trainer
from places import ROOT
from torch.profiler import ProfilerActivity, profile

from apollo_ipc import cpu_products
from apollo_ipc.cli.plan import parse_bytes
from apollo_ipc.config import Train
from apollo_ipc.cpu_products import has_bf16_units
from apollo_ipc.demo.models import make_model
from apollo_ipc.errors import UserError
from apollo_ipc.memory_plan import Item, MemoryPlan

NUM_TOKENS = 256
IDS = [(i * 37) % 8192 for i in range(NUM_TOKENS)]
EXAMPLE = TokenisedExample(IDS, [True] * NUM_TOKENS)
# Large enough that activations and the head's gradient, not single numbers, make the sum.
SHAPES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
}
ARCHES = ["qwen3", "qwen3.5", "qwen3_moe"]  # tied and dense; untied with two kinds of layers; with experts


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {arch: make_model(base / arch, arch, **SHAPES) for arch in ARCHES}


def forecast(model_dir: Path, **options: Any) -> MemoryPlan:
    return plan(Request(str(model_dir), Train(max_tokens=NUM_TOKENS, **options), 0.5))


def of(items: list[Item], name: str) -> int:
    return next(item.bytes for item in items if item.name.startswith(name))


def allocated(action: Callable[[], Any]) -> tuple[int, int]:
    """(bytes that `action` left allocated, the most at once), both beside what was there before.

    By the records that torch's CPU allocator gives the profiler: independent of how the forecast counts.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = action()
    results: Any = profiler.profiler
    records = results.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in records if e.name() == "[memory]")
    now = most = 0
    for _, num_bytes in events:
        now += num_bytes
        most = max(most, now)
    del kept
    return now, most


def saved_for_backward(trainer: Trainer) -> int:
    """Bytes of the distinct storages that autograd saves in the forward pass, without parameters."""
    known = {p.untyped_storage().data_ptr() for p in trainer.live.model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = trainer.forward.hidden(torch.tensor([IDS]))
    total = sum(storage.nbytes() for storage in saved.values())
    del hidden
    return total


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("arch", "rank", "rounding"),
    [
        ("qwen3", 64, "stochastic"),
        ("qwen3.5", 300, "kahan"),
        ("qwen3_moe", 64, "stochastic"),
        pytest.param("qwen3", 300, "kahan", marks=SLOW),
        pytest.param("qwen3.5", 64, "stochastic", marks=SLOW),
        pytest.param("qwen3_moe", 300, "kahan", marks=SLOW),
    ],
)
def test_weights_and_optimizer_state_are_forecast_to_the_byte(model_dirs, arch, rank, rounding):
    live = load_offline(model_dirs[arch])
    trainer = Trainer(live, Train(rank=rank, rounding=rounding))
    made = forecast(model_dirs[arch], rank=rank, rounding=rounding)
    assert of(made.vllm, "weights") == sum(p.nbytes for p in live.model.parameters())
    assert of(made.trainer, "optimizer state") == trainer.optimizer.state_size_bytes()
    assert made.num_parameters == sum(p.numel() for p in live.model.parameters())


@pytest.mark.parametrize(
    ("arch", "checkpointing"),
    [
        ("qwen3", False),
        ("qwen3_moe", False),
        ("qwen3.5", True),
        pytest.param("qwen3.5", False, marks=SLOW),
        pytest.param("qwen3", True, marks=SLOW),
        pytest.param("qwen3_moe", True, marks=SLOW),
    ],
)
def test_activations_and_the_peak_of_a_step_are_forecast_within_a_tenth(model_dirs, arch, checkpointing):
    options = Train(activation_checkpointing=checkpointing, rounding="nearest")
    trainer = Trainer(load_offline(model_dirs[arch]), options)
    made = forecast(model_dirs[arch], activation_checkpointing=checkpointing, rounding="nearest")

    def forward() -> torch.Tensor:
        with torch.enable_grad():
            return trainer.forward.hidden(torch.tensor([IDS]))

    trainer.step(EXAMPLE, 1e-5)  # compiles the update, makes the buffers for products
    kept, _ = allocated(forward)
    activations = of(made.step, "activations")
    assert activations == pytest.approx(kept, rel=0.1)
    if not checkpointing:  # the inputs of checkpointed layers are kept by their frames, which no hook sees
        assert activations == pytest.approx(saved_for_backward(trainer), rel=0.1)
    _, peak = allocated(lambda: trainer.step(EXAMPLE, 1e-5))
    assert of(made.trainer, "one step") == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_largest_gradients_alive_at_once_are_the_heads(model_dirs, arch):
    trainer = Trainer(load_offline(model_dirs[arch]), Train())
    parameters = list(trainer.live.model.parameters())
    live: list[int] = []
    for parameter in parameters:  # runs when a gradient is there, before the optimizer uses it up
        parameter.register_hook(
            lambda grad: live.append(
                grad.nbytes + sum(p.grad.nbytes for p in parameters if p.grad is not None)
            )
        )
    trainer.step(TokenisedExample(IDS[:8], [True] * 8), 1e-5)
    largest = max(p.nbytes for p in parameters)
    assert max(live) == largest, "no second one stays in a parameter"
    head: Any = trainer.live.model.get_output_embeddings()
    # In the forward pass: summed in fp32 (loss.py), and for a moment copied into the head's dtype.
    assert of(forecast(model_dirs[arch]).step, "largest gradients") == head.weight.numel() * (4 + 2)


def test_accumulation_adds_every_parameters_gradient(model_dirs):
    one, four = (forecast(model_dirs["qwen3"], accumulate_steps=n) for n in (1, 4))
    gradients = of(four.trainer, "gradients of accumulation")
    assert gradients == 4 * four.num_parameters, "each gradient is summed in fp32"
    assert four.trainer_bytes == one.trainer_bytes + gradients
    trainer = Trainer(load_offline(model_dirs["qwen3"]), Train())
    assert trainer.accumulation_bytes() == gradients


@pytest.mark.skipif(not has_compiled_update(is_gpu=False), reason="numba is not installed")
@pytest.mark.parametrize("projection", ["gaussian", "block_sign"])
def test_the_projections_that_are_kept_are_forecast_to_the_byte(model_dirs, projection):
    made = forecast(model_dirs["qwen3"], projection=projection)
    trainer = Trainer(load_offline(model_dirs["qwen3"]), Train(projection=projection))
    for _ in range(2):
        trainer.step(TokenisedExample(IDS[:8], [True] * 8), 1e-5)
    sketches = [sketch for _, sketch in trainer.optimizer._backends["cpu"]._kept.values()]
    kept = sum(part.nbytes for sketch in sketches for part in sketch if isinstance(part, torch.Tensor))
    if projection == "gaussian" and not has_bf16_units():
        # Each thread converts gradients in memory of its own, which stays: what the largest matrix needs.
        kept += 4 * SHAPES["vocab_size"] * SHAPES["hidden_size"] * (torch.get_num_threads() + 1)
    assert of(made.trainer, "projections") == kept


def test_gradients_that_wait_are_forecast_on_a_cpu_and_not_on_a_gpu(model_dirs, monkeypatch):
    """The head is the peak, unless more may wait than a model of this size has."""
    request = Request(str(model_dirs["qwen3"]), Train(max_tokens=8), 0.5)
    monkeypatch.setattr(cpu_products, "extra_bytes", lambda *_: 0)  # of some CPUs' head that is more
    monkeypatch.setattr(memory_plan, "CPU_HELD_ELEMENTS", 0)
    none = of(plan(request).trainer, "one step")
    monkeypatch.setattr(memory_plan, "CPU_HELD_ELEMENTS", 2**40)
    assert of(plan(request).trainer, "one step") > none + 2**18
    on_gpu = Request(str(model_dirs["qwen3"]), Train(max_tokens=8), 0.5, device_bytes=10**10)
    many = of(plan(on_gpu).trainer, "one step")
    monkeypatch.setattr(memory_plan, "CPU_HELD_ELEMENTS", 0)
    assert many == of(plan(on_gpu).trainer, "one step")


# --- the command ---


@pytest.mark.slow
def test_27b_is_planned_from_its_configuration_alone():
    model_dir = str(ROOT / "tests/assets/qwen3.5-27b")
    flags = ["--gpu-memory-utilization", "0.75", "--activation-checkpointing", "--max-tokens", "256"]
    command = [sys.executable, "-m", "apollo_ipc", "plan", model_dir, *flags, "--device-memory", "141GB"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["fits"] is True
    assert made["num_parameters"] == pytest.approx(26.9e9, rel=0.01)
    assert made["total_bytes"] == sum(item["bytes"] for item in made["vllm"] + made["trainer"])


@pytest.fixture
def planned(apollo, monkeypatch):
    """`planned("MODEL_DIR", ...)`: the command, and the process that it starts, in this one. Each importing
    torch of its own takes ten seconds; the test before has them both."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        said = io.StringIO()
        with monkeypatch.context() as modules, contextlib.redirect_stdout(said):
            for name in ("fla", "causal_conv1d"):  # which main() takes away
                modules.setitem(sys.modules, name, None)
            status = memory_plan.main(command[-1:])
        return subprocess.CompletedProcess(command, status, said.getvalue().encode())

    monkeypatch.setattr("apollo_ipc.cli.plan.subprocess.run", run)
    return partial(apollo, "plan")


def test_what_does_not_fit_says_what_would_and_exits_with_1(model_dirs, planned):
    plan_of = [str(model_dirs["qwen3"]), "--max-tokens", "64", "--device-memory"]
    done = planned(*plan_of, "600MB")
    assert done.returncode == 1, done.stderr
    assert "does not fit; it would with --gpu-memory-utilization 0." in done.stdout
    none = planned(*plan_of, "100MB")
    assert none.returncode == 1
    assert "weights and training together are more than the device has" in none.stdout


def test_of_several_gpus_the_first_is_counted_with_a_part_of_the_weights_and_all_of_the_trainer(
    model_dirs, planned
):
    def items(*flags: str) -> dict[str, int]:
        room = ["--device-memory", "20GB", "--gpu-memory-utilization", "0.5"]
        done = planned(str(model_dirs["qwen3"]), "--max-tokens", "64", "--json", *room, *flags)
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        return {item["name"]: item["bytes"] for item in made["vllm"] + made["trainer"]}

    alone, one_of_two = items(), items("--tensor-parallel-size", "2")
    weights = "weights, served and trained"
    assert one_of_two[weights] == (alone[weights] + 1) // 2
    assert 0 < one_of_two.pop("gathered weights") < alone[weights]
    assert {n: b for n, b in one_of_two.items() if n in ("optimizer state", "one step, at its peak")} == {
        n: b for n, b in alone.items() if n in ("optimizer state", "one step, at its peak")
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tensor-parallel-size", "0"], "0 processes cannot serve; give 1 or more"),
        (["--rank", "0"], "--rank: 0 is not what is needed: Expected `int` >= 1"),
        (["--max-tokens", "1"], "--max-tokens: 1 is not what is needed: Expected `int` >= 2"),
        (["--accumulate", "0"], "--accumulate: 0 is not what is needed: Expected `int` >= 1"),
        (["--gpu-memory-utilization", "75"], "give one above 0, at most 1, e.g. 0.75"),
        (["--device-memory", "much"], "give a size like 141GB or 80GiB"),
        (["--device-memory", "141"], "give a size like 141GB or 80GiB"),
    ],
)
def test_a_wrong_flag_is_answered_with_what_would_be_right(model_dirs, planned, flags, said):
    done = planned(str(model_dirs["qwen3"]), *flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_that_is_no_model_is_answered_with_what_to_give(tmp_path, planned):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    (tmp_path / "empty").mkdir()
    for path, said in [
        (tmp_path, "give the directory of a causal language model that transformers knows"),
        (tmp_path / "empty", "has no config.json: give a model's directory"),
        (tmp_path / "config.json", f"is a file; give the directory, {tmp_path}"),
        (tmp_path / "none", "no such directory"),
    ]:
        done = planned(str(path))
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("141GB", 141 * 10**9), ("80 GiB", 80 * 2**30), ("1.5e9", 1_500_000_000)]
)
def test_a_size_is_read_as_it_is_written(text, num_bytes):
    assert parse_bytes(text) == num_bytes


def test_a_size_beyond_any_device_is_refused():
    with pytest.raises(UserError, match="is no device's memory"):
        parse_bytes("1e300GB")
