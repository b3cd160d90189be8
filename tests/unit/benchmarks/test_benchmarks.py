"""The benchmarks run, and what they compare is comparable. Their figures are not tested here."""

import importlib
import json
import math
import subprocess
import sys

import msgspec
import pytest
from places import BENCHMARKS

from apollo_ipc.checkpoint import Commit
from apollo_ipc.wire.replies import JobInfo

TOY = ["--layers", "2", "--pretrain-steps", "2", "--eval-windows", "2", "--seeds", "1"]


@pytest.fixture
def small_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import small_lm  # pyright: ignore[reportMissingImports]

    return small_lm


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "script", ["finetune.py", "online.py", "soak.py", "fuzz.py", "step.py", "checkpoint.py", "gpu_loop.py"]
)
def test_help_is_there_without_loading_torch(script):
    code = (
        f"import runpy, sys; sys.argv = [{script!r}, '--help']; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        f"try: runpy.run_path({str(BENCHMARKS / script)!r}, run_name='__main__')\n"
        "except SystemExit: print('loaded', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    text, _, loaded = done.stdout.partition("loaded ")
    assert "--json" in text
    assert loaded
    assert not set(loaded.split()) & {"torch", "transformers", "matplotlib", "numpy"}


def test_an_unknown_contestant_is_refused_by_name():
    command = [sys.executable, str(BENCHMARKS / "finetune.py"), "--only", "adamw-fp32,lion"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no contestant lion; there are adamw-fp32" in done.stderr


@pytest.mark.parametrize("text", ["english", "python_source"])
def test_the_split_of_a_text_is_the_same_each_time_and_disjoint(small_lm, text):
    corpus, again = getattr(small_lm, text)(), getattr(small_lm, text)()
    assert corpus.train.equal(again.train)
    assert corpus.held_out.equal(again.held_out)
    assert len(corpus.train) > 4 * len(corpus.held_out) > 4 * 20_000
    train = bytes(corpus.train.tolist())
    windows = corpus.held_out_windows(48)
    assert windows.equal(again.held_out_windows(48))
    assert windows.shape == (48, small_lm.SEQ + 1)
    assert len(windows.unique(dim=0)) == 48
    assert not any(bytes(window.tolist()) in train for window in windows)


def test_every_contestant_of_a_seed_sees_the_same_windows(small_lm):
    import torch

    text = small_lm.python_source().train
    draws = [small_lm.random_windows(text, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


def test_a_bf16_model_computes_on_its_stored_weights_and_gets_bf16_gradients(small_lm):
    import torch

    settings = small_lm.ModelSettings(num_layers=1, hidden=64, intermediate=64)
    model = small_lm.new_model(settings)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    stored = small_lm.StoredModel(model, start, torch.bfloat16)
    computed = dict(model.named_parameters())
    for name, param in stored.named:
        assert param.dtype == torch.bfloat16
        assert computed[name].equal(start[name].bfloat16().float())
    windows = small_lm.english().held_out_windows(2)
    stored.backward(small_lm.lm_loss(model, windows))
    assert all(param.grad is not None and param.grad.dtype == torch.bfloat16 for param in stored.params)
    assert all(param.grad is None for param in computed.values())


def test_the_loss_of_a_continuation_leaves_its_context_out(small_lm):
    import torch

    model = small_lm.new_model(small_lm.ModelSettings(num_layers=1, hidden=64, intermediate=64))
    window = small_lm.as_tokens(b"two and two are four").long()[None]
    logits = model(input_ids=window[:, :-1]).logits[0]
    by_hand = [-torch.log_softmax(logits[i - 1], 0)[window[0, i]].item() for i in range(16, 20)]
    assert small_lm.lm_loss(model, window, 16).item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)


@pytest.mark.slow
def test_three_steps_of_two_contestants_give_finite_rows(tmp_path):
    names = ["apollo-fp32", "apollo-stochastic"]
    options = [*TOY, "--quick", "--steps", 3, "--lr", "1e-4", "--only", ",".join(names)]
    done = run("finetune.py", *options, "--cache", tmp_path, "--json", tmp_path / "figures.json")
    assert "Stochastic within 1%" in " ".join(done.stdout.split())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["settings"]["steps"] == 3  # what is given holds beside --quick
    assert [row["name"] for row in figures["rows"]] == names
    for row in figures["rows"]:
        for key in ("held_out_loss_mean", "forgetting_mean", "ratio_to_fp32", "s_per_step", "state_bytes"):
            assert math.isfinite(row[key]), (row["name"], key)
        assert row["held_out_loss_std"] is None  # of one seed there is none
        assert row["held_out_loss_mean"] != row["curves"][0][0]  # something was learned
    assert figures["rows"][0]["ratio_to_fp32"] == 1
    assert {row["storage"] for row in figures["rows"]} == {"fp32", "bf16"}
    assert len(list(tmp_path.glob("small_lm-*.safetensors"))) == 1


@pytest.mark.slow
def test_the_stream_of_facts_gives_finite_rows_for_each_phase(tmp_path):
    options = [*TOY, "--scale", 0.03, "--only", "default,adamw-fp32", "--json", tmp_path / "figures.json"]
    run("online.py", *options, "--cache", tmp_path)
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"default", "adamw-fp32"}
    assert len({row["phase"] for row in rows}) == 6
    for row in rows:
        for key in ("fact_loss", "damage", "update_rms", "written_rms", "grad_norm", "drift_rms"):
            assert math.isfinite(row[key]), (row["name"], row["phase"], key)


@pytest.fixture
def benchmark(monkeypatch):
    """A module of benchmarks/ by its name, imported as its script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_checkpoint_gives_a_row_for_each_contestant_and_the_ratios(tmp_path):
    run(
        "checkpoint.py",
        "--gb",
        0.02,
        "--rounds",
        2,
        "--settle",
        0,
        "--dir",
        tmp_path,
        "--json",
        tmp_path / "figures.json",
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]  # cleaned up
    rows = {(row["name"], row["tensors_changed_fraction"]): row for row in figures["rows"]}
    for fraction in (0.01, 0.1, 1.0):
        assert rows["sync, full", fraction]["bytes_written"] >= rows["plain write", fraction]["bytes_written"]
        assert rows["sync, delta", fraction]["bytes_written"] > 0
    for kind in ("full", "delta"):  # nothing has changed, nothing is written
        assert rows[f"sync, {kind}", 0.0]["bytes_written"] == 0
    whole = figures["gb"] * 1e9
    for name in ("sync, full", "safetensors save_file", "torch.save", "dcp.async_save", "mmap and memcpy"):
        assert whole <= rows[name, 1.0]["bytes_written"] < 1.05 * whole, name
    for row in figures["rows"]:
        assert 0 <= row["training_stood_still_s"] <= row["quartiles_s"][1] + row["seconds"], row
    names = ("unchanged_over_read_floor", "all_changed_over_plain_write", "delta_bytes_over_full_bytes")
    assert all(figures[name] > 0 for name in names)
    assert 0.1 < figures["moved_elements_fraction"] < 0.6


def test_the_kills_of_a_seed_are_the_same_and_each_fifth_takes_vllm(benchmark):
    plan_kills = benchmark("soak_kills").plan_kills
    kills = plan_kills(20, 5, seed=3)
    assert kills == plan_kills(20, 5, seed=3) != plan_kills(20, 5, seed=4)
    assert [number for number, (what, _) in enumerate(kills, 1) if "vllm" in what] == [5, 10, 15, 20]
    assert {what for what, _ in kills} == {"front", "trainer", "worker", "vllm", "vllm+worker"}
    assert {is_in_sync for _, is_in_sync in kills} == {True, False}


def test_a_lost_job_and_one_that_was_queued_twice_are_seen(benchmark):
    def job(seq, state, steps_done, key):
        return JobInfo(f"job-{seq}", seq, state, 0.0, 1, 3, steps_done=steps_done, idempotency_key=key)

    jobs = [job(1, "durable", 3, "a"), job(2, "applied", 3, "b"), job(3, "durable", 2, "c")]
    jobs += [job(4, "durable", 3, "d"), job(5, "durable", 3, "d")]
    acknowledged = {
        "a": ("job-1", 3),
        "b": ("job-2", 3),
        "c": ("job-3", 3),
        "d": ("job-4", 3),
        "e": ("job-9", 3),
    }
    problems = []
    figures = benchmark("soak").judge_jobs(acknowledged, jobs, problems)
    assert figures["jobs_lost"] == 3
    assert figures["jobs_applied_twice"] == 1
    assert figures["steps_expected"] == 12
    assert len(problems) == 4


def test_a_completion_may_fail_only_while_vllm_is_down(benchmark):
    system = object.__new__(benchmark("soak_system").System)
    system._downs = [(10.0, 20.0), (30.0, None)]
    assert not system.was_down(1.0, 9.0)
    assert system.was_down(9.0, 11.0)  # asked before the kill, cut off by it
    assert system.was_down(12.0, 13.0)
    assert system.was_down(19.0, 25.0)
    assert not system.was_down(21.0, 29.0)
    assert system.was_down(40.0, 41.0)  # not back yet


def test_what_a_commit_says_it_holds_are_ended_jobs_and_the_steps_of_a_half_done_one(benchmark):
    def job(seq, steps_done, state="applied"):
        return JobInfo(f"job-{seq}", seq, state, 0.0, 1, 9, steps_done=steps_done)

    commit = Commit(3, 5, 7, applied_seq=2, committed_at=0.0, shards={}, tensors={})
    soak_disk = benchmark("soak_disk")
    half_done = soak_disk.HalfDone()

    def steps_in_commit(commit, jobs):
        return soak_disk.steps_in_commit(commit, jobs, half_done)

    jobs = [job(1, 4), job(2, 3), job(3, 6)]
    assert steps_in_commit(commit, jobs) == (7, 7)
    half = msgspec.structs.replace(commit, extra={"running": {"job_id": "job-3", "steps_done": 2}})
    assert steps_in_commit(half, jobs) == (9, 9)
    # Those of a cancelled job went with the weights, where these went back; a restore has undone the rest.
    jobs = [job(1, 4), job(2, 3, "cancelled"), job(3, 6)]
    assert steps_in_commit(half, jobs) == (6, 9)
    assert steps_in_commit(half, [job(1, 4), job(2, 3, "undone")]) == (6, 6)
    # A version that was committed in the middle of a job brings its steps along.
    after = Commit(3, 6, 8, applied_seq=2, committed_at=0.0, shards={}, tensors={})
    half_done.restored(half, half.weight_version, after)
    assert [half_done.of(half.weight_version), half_done.of(after.weight_version)] == [0, 2]
    assert steps_in_commit(after, [job(1, 4), job(2, 3)]) == (9, 9)


def test_what_was_cancelled_poison_or_undone_is_not_lost_and_all_else_is(benchmark):
    def job(seq, state, started_at, **more):
        return JobInfo(
            f"job-{seq}", seq, state, 0.0, 1, 2, idempotency_key=f"{seq}", started_at=started_at, **more
        )

    jobs = [
        job(1, "durable", 1.0, steps_done=2),
        job(2, "cancelled", 2.0, steps_done=1),
        job(3, "quarantined", 4.0),
        job(4, "undone", 3.0, steps_done=2, undone_by=7),
        job(5, "undone", 5.0, steps_done=2, undone_by=8),
        job(6, "quarantined", 6.0),
    ]
    acknowledged = {str(seq): (f"job-{seq}", 2) for seq in range(1, 7)}
    problems = []
    figures = benchmark("soak").judge_jobs(
        acknowledged, jobs, problems, {"2": "cancelled", "3": "poison"}, restored={7}
    )
    assert (figures["jobs_lost"], figures["jobs_out_of_order"]) == (2, 1), (
        "5 by no known restore; 6 no poison"
    )
    assert (figures["steps_expected"], figures["steps_of_cancelled_jobs"]) == (2, 1)


@pytest.mark.slow
def test_the_step_is_taken_apart_and_its_parts_are_the_whole(tmp_path):
    from apollo_ipc.demo.models import make_model

    model = make_model(tmp_path / "model", "qwen3", num_hidden_layers=2, hidden_size=128)
    path = tmp_path / "step.json"
    done = run("step.py", "--model", model, "--tokens", "8", "--rounds", "2", "--json", path)
    result = json.loads(path.read_text())
    names = ["ours, Gaussian", "ours, block-sign", "AdamW fused", "SGD", "apollo-torch"]
    assert [(row["num_tokens"], row["name"]) for row in result["rows"]] == [
        (n, x) for n in (8,) for x in names
    ]
    for row in result["rows"]:
        least = [row[f"{part}_least_s"] for part in ("forward", "backward", "optimizer")]
        assert all(seconds > 0 for seconds in least)
        assert sum(least) <= row["step_least_s"] + 1e-9
        assert row["optimizer_over_floor"] == row["optimizer_s"] / row["optimizer_floor_s"]
    assert [one["num_tokens"] for one in result["memory"]] == [8]
    assert all(one["planned_bytes"] == sum(one["plan"].values()) for one in result["memory"])
    assert "over AdamW" in done.stdout
