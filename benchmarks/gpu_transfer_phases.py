"""What gpu_transfer.py measures, in its order; the worker's start is gpu_loop_phases.attach."""

from __future__ import annotations

import dataclasses
import os
import statistics
from typing import Any

from gpu_loop_load import run_phase, summary
from gpu_loop_memory import DeviceMemory, PeakSampler, ProcessMemory, settled
from gpu_loop_phases import Loop, load_settings, target_logprob, train_target
from gpu_loop_system import LoopFailed, Training, of_jobs, random_examples
from gpu_transfer_peer import Peer, Sender, Updates

from apollo_ipc.manifest import read_manifest
from apollo_ipc.process.serving import worker_environment

RESTORED = 0.1  # of what training has changed the target's logprob by, so much may be left: kernels round


def serve_alone(loop: Loop) -> None:
    """The load without any update."""
    loop.figures["load_settings"] = dataclasses.asdict(load_settings(loop))
    loop.figures["served_logprob"] = {"of the checkpoint": target_logprob(loop)}
    _load(loop, "alone")


def steps_in_place(loop: Loop) -> None:
    """The load while our worker trains the served weights."""
    system, options, figures = loop.system, loop.options, loop.figures
    assert loop.meter is not None
    known, num_jobs = set(system.drops_ms()), 0

    def make_examples() -> list[dict[str, Any]]:
        nonlocal num_jobs
        num_jobs += 1
        seed = options.seed * 1_000_003 + num_jobs
        return random_examples(seed, options.job_steps, options.train_tokens, loop.model.vocab_size)

    with PeakSampler(loop.meter.used) as sampler, Training(system, make_examples) as training:
        _load(loop, "steps in place")
    drops = [ms / 1e3 for version, ms in system.drops_ms().items() if version not in known]
    figures["in_place"] = {
        **of_jobs(training.jobs),
        "num_updates": len(drops),
        "cache_drop_median_s": statistics.median(drops) if drops else None,
        "cache_drop_max_s": max(drops, default=None),
        "peak_training_bytes": sampler.peak_bytes - loop.from_bytes,
    }
    train_target(loop)
    figures["served_logprob"]["after steps in place"] = target_logprob(loop)


def full_copies(loop: Loop, peer: Peer) -> None:
    """The load while a second copy is sent, the worker having ended."""
    system, options, figures = loop.system, loop.options, loop.figures
    system.stop_worker()
    manifest = read_manifest(system.server.runtime_dir)
    is_gpu = manifest is not None and manifest.transport == "cuda_ipc"
    pids: list[int] = []
    assert manifest is not None
    meter = DeviceMemory(manifest.device_uuid) if is_gpu else ProcessMemory(lambda: pids)
    before = settled(meter.used)
    env = worker_environment(os.environ)
    sender = Sender(
        peer, loop.model.directory, system.server.url, options.pause, env, loop.system.base / "sender.log"
    )
    with sender:
        pids.append(sender.pid)
        added = settled(meter.used) - before
        with PeakSampler(meter.used) as sampler, Updates(sender, options.updates, options.seconds) as updates:
            _load(loop, "full copies")
    context = figures["memory"]["cuda_context_bytes"]
    figures["full_copy"] = {
        "pause": options.pause,
        **sender.copy,
        **of_updates(updates.done, sender.copy["bytes"]),
        "added_bytes": added,
        "added_beyond_context_bytes": None if context is None else added - context,
        "peak_added_bytes": sampler.peak_bytes - before,
    }
    served = figures["served_logprob"]
    served["after full copies"] = target_logprob(loop)
    check_restored(*served.values())


def of_updates(updates: list[dict[str, float]], num_bytes: int) -> dict[str, Any]:
    """Medians over the updates, and the longest that requests were held."""
    medians = {name: statistics.median(update[name] for update in updates) for name in updates[0]}
    return {
        "num_updates": len(updates),
        **medians,
        "held_max_s": max(update["held_s"] for update in updates),
        "bytes_per_s": num_bytes / medians["update_s"],
    }


def check_restored(checkpoint: float, trained: float, restored: float) -> None:
    """Raises LoopFailed unless the last full copy has undone what training had changed."""
    if abs(restored - checkpoint) > RESTORED * abs(trained - checkpoint):
        raise LoopFailed(
            f"the full copy did not reach what is served: the target's logprob was {checkpoint:.3f} with the "
            f"checkpoint, {trained:.3f} after training and {restored:.3f} after the update"
        )


def _load(loop: Loop, name: str) -> None:
    """The same arrivals in each phase, other prompts."""
    server, options, load = loop.system.server, loop.options, loop.figures.setdefault("load", {})
    prompt_seed = options.seed * 1_000_003 + len(load)
    found = run_phase(server.url, server.model_name, load_settings(loop), options.seed, prompt_seed)
    load[name] = summary(found)
