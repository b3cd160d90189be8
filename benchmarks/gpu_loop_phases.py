"""What gpu_loop.py measures, in its order. Each function adds to the figures; its docstring is told."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_loop_fit import room_for_sync
from gpu_loop_load import LoadSettings, Request, run_phase, summary
from gpu_loop_memory import DeviceMemory, PeakSampler, ProcessMemory, cuda_context_bytes, settled
from gpu_loop_model import RandomModel
from gpu_loop_mps import MpsDaemon
from gpu_loop_system import FinishedJob, System, Training, of_jobs, random_examples

from apollo_ipc.manifest import read_manifest
from apollo_ipc.process.serving import prompt_logprobs, worker_environment

TARGET_TOKENS, TARGET_STEPS, TARGET_LR = 16, 10, 1e-4
WARM_UP_S = 5.0
SPLIT_ROUNDS = 5
QUIET_JOB_FACTOR = 3  # events come every 0.1 s: the longer the job, the better a short step is known
Figures = dict[str, Any]


@dataclasses.dataclass
class Loop:
    """What the phases share. meter, from_bytes: of the worker's memory, and where training's part begins."""

    system: System
    model: RandomModel
    options: argparse.Namespace
    figures: Figures
    mps: MpsDaemon | None = None
    meter: DeviceMemory | ProcessMemory | None = None
    from_bytes: int = 0

    def not_measured(self, name: str, why: str) -> None:
        self.figures["not_measured"][name] = why


def attach(loop: Loop) -> None:
    """Starting the worker, and what memory it takes before its first step."""
    system, model, options, figures = loop.system, loop.model, loop.options, loop.figures
    settings = load_settings(loop)
    warm_up = dataclasses.replace(settings, seconds=WARM_UP_S)
    run_phase(system.server.url, system.server.model_name, warm_up, options.seed, -1)
    manifest = read_manifest(system.server.runtime_dir)
    assert manifest is not None
    is_gpu = manifest.transport == "cuda_ipc"
    meter = DeviceMemory(manifest.device_uuid) if is_gpu else ProcessMemory(system.worker_pids)
    memory: Figures = {"source": meter.source, "cuda_context_bytes": None}
    if is_gpu:
        memory["cuda_context_bytes"] = cuda_context_bytes(meter.used)
    else:
        loop.not_measured("memory.cuda_context_bytes", "no CUDA device")
    before = settled(meter.used) if is_gpu else 0  # on a CPU the worker's processes are not there yet
    figures["attach"] = system.start_worker()
    figures["attach"] |= system.mapped()
    if loop.mps is not None:
        figures["mps_clients"] = loop.mps.require_clients(system.worker_pids(), system.server.pid)
    if figures["attach"]["attach_s"] is None:
        loop.not_measured("attach.attach_s", "shorter than two of the worker's heartbeats")
    idle = settled(meter.used)
    memory |= {"before_worker_bytes": before, "added_before_first_step_bytes": idle - before}
    if (context := memory["cuda_context_bytes"]) is not None:
        beyond = idle - before - context
        memory |= {"added_beyond_context_bytes": beyond, "beyond_over_weights": beyond / model.num_bytes}
    figures["memory"] = memory
    figures["prefix_caching"] = system.has_prefix_cache()
    # Python, torch and its threads are no part of the plan; on a GPU the context is.
    loop.meter, loop.from_bytes = meter, before if is_gpu else idle


def train_quietly(loop: Loop) -> None:
    """Training beside an idle server: one target, then examples of full length."""
    system, model, options, figures = loop.system, loop.model, loop.options, loop.figures
    assert loop.meter is not None
    with PeakSampler(loop.meter.used) as sampler:
        served = {"before": target_logprob(loop)}
        train_target(loop)
        served["after"] = target_logprob(loop)
        num_steps = QUIET_JOB_FACTOR * options.job_steps
        rows = random_examples(options.seed, num_steps, options.train_tokens, model.vocab_size)
        job = system.train(rows)
    figures["served_logprob"] = served
    figures["train_beside_idle_server"] = of_jobs([job])
    peak, forecast = sampler.peak_bytes - loop.from_bytes, figures["plan"]["trainer_bytes"]
    figures["memory"] |= {
        "peak_training_bytes": peak, "planned_training_bytes": forecast, "peak_over_plan": peak / forecast,
    }  # fmt: skip


def target_ids(loop: Loop) -> list[int]:
    """A context and, from its middle on, what shall become likely after it."""
    generator = random.Random(loop.options.seed)
    return [generator.randrange(loop.model.vocab_size) for _ in range(2 * TARGET_TOKENS)]


def target_logprob(loop: Loop) -> float:
    """vLLM's own, in nats a token of the continuation."""
    server = loop.system.server
    return statistics.mean(prompt_logprobs(server.url, server.model_name, target_ids(loop))[-TARGET_TOKENS:])


def train_target(loop: Loop) -> None:
    ids = target_ids(loop)
    target = {"context_ids": ids[:TARGET_TOKENS], "continuation_ids": ids[TARGET_TOKENS:]}
    loop.system.train([target], epochs=TARGET_STEPS, lr=TARGET_LR)


def load(loop: Loop) -> None:
    """Serving under load, without and with training in turns."""
    system, model, options, figures = loop.system, loop.model, loop.options, loop.figures
    settings = load_settings(loop)
    requests: dict[str, list[Request]] = {"without training": [], "with training": []}
    jobs: list[FinishedJob] = []
    figures["load_settings"] = {**dataclasses.asdict(settings), "rounds": options.rounds}
    known, num_examples = set(system.drops_ms()), 0

    def make_examples() -> list[dict[str, Any]]:
        nonlocal num_examples
        num_examples += 1
        seed = options.seed * 1_000_003 + num_examples
        return random_examples(seed, options.job_steps, options.train_tokens, model.vocab_size)

    def serve(name: str, round_number: int) -> None:
        # Both phases of a round get the same arrivals, and no two phases the same prompts.
        prompt_seed = 2 * (options.seed * 1_000_003 + round_number) + (name == "with training")
        url, served = system.server.url, system.server.model_name
        requests[name] += run_phase(url, served, settings, options.seed + round_number, prompt_seed)

    def serve_beside_training(round_number: int) -> None:
        with Training(system, make_examples) as training:
            serve("with training", round_number)
        jobs.extend(training.jobs)

    try:
        for number in range(options.rounds):
            if number % 2:
                serve_beside_training(number)
            serve("without training", number)
            if number % 2 == 0:
                serve_beside_training(number)
    finally:
        figures["load"] = {name: summary(found) for name, found in requests.items()}
    drops = [ms / 1e3 for version, ms in system.drops_ms().items() if version not in known]
    figures["train_under_load"] = of_jobs(jobs)
    figures["cache_drop_under_load"] = {
        "num": len(drops),
        "median_s": statistics.median(drops) if drops else None,
        "max_s": max(drops, default=None),
    }
    if not figures["prefix_caching"]:
        loop.not_measured("cache_drop_under_load", "vLLM says of no prefix cache for this model")


def sync(loop: Loop) -> None:
    """Checkpoint syncs, each after one more job."""
    system, model, options, figures = loop.system, loop.model, loop.options, loop.figures
    rows = []
    # The first sync of all reads every shard once, for its digests: it is a row of its own.
    for number, kind in enumerate(("full", "delta", "full")):
        name = "full, the first" if number == 0 else kind
        if why := room_for_sync(model, kind):
            loop.not_measured(f"sync: {name}", why)
            continue
        seed = -1 - number - options.seed
        system.train(random_examples(seed, options.job_steps, options.train_tokens, model.vocab_size))
        result = system.sync(kind)
        waited_s, duration_s = result["training_waited_s"], result["duration_s"]
        rows.append({
            "name": name, "kind": result["kind"], "duration_s": duration_s, "training_waited_s": waited_s,
            "bytes_changed": result["bytes_changed"], "bytes_written": result["bytes_written"],
            "delta_bytes": result["delta_bytes"],
            "synced_bytes_per_s": result["bytes_changed"] / duration_s,
            "written_bytes_per_s": result["bytes_written"] / duration_s,
            "copied_out_bytes_per_s": result["bytes_changed"] / waited_s if waited_s else None,
        })  # fmt: skip
        figures["sync"] = rows


def split_step(loop: Loop) -> None:
    """A step in its parts, in a process of its own: vLLM and the worker have ended."""
    model, options, figures = loop.model, loop.options, loop.figures
    script = Path(__file__).with_name("gpu_loop_step.py")
    numbers = [str(options.train_tokens), str(SPLIT_ROUNDS)]
    done = subprocess.run(
        [sys.executable, str(script), str(model.directory), *numbers],
        env=worker_environment(os.environ),  # with our settings: gpu_loop.environment
        capture_output=True,
        text=True,
    )
    if done.returncode:
        figures["step_alone"] = None
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        loop.not_measured("step_alone", last)
        return
    figures["step_alone"] = json.loads(done.stdout.splitlines()[-1])
    if figures["step_alone"]["step_peak_allocated_bytes"] is None:
        loop.not_measured("step_alone.step_peak_allocated_bytes", "no CUDA device")


def load_settings(loop: Loop) -> LoadSettings:
    options = loop.options
    return LoadSettings(
        options.rate, options.seconds, options.prompt_tokens, options.output_tokens, loop.model.vocab_size
    )
