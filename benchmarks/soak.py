"""Kill -9 of worker and vLLM at random moments, under jobs and completions: nothing lost, nothing done twice.

A real vLLM server and a real worker on a tiny model. One client sends jobs with idempotency keys and sends
them again until they are acknowledged, one asks for completions. The worker's front, its trainer, both, vLLM,
or all of them are killed, also in the middle of a sync, and started again. In the end all jobs must be
durable, the live weights must equal the checkpoint bit for bit, and the optimizer's own counter, which no
queue has ever seen, must equal the sum of the jobs' steps.

    python benchmarks/soak.py --kills 20 --json soak.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

ARCHITECTURES = {"qwen3": "qwen3", "qwen3_5": "qwen3.5", "real": "real"}
# 400 MB a sync: not so often that nothing else is done.
OF_REAL = {
    "APOLLO_CHECKPOINT__SYNC_INTERVAL_S": "15",
    "APOLLO_CHECKPOINT__FULL_INTERVAL_S": "60",
}
ENDED = ("applied", "durable", "failed", "cancelled", "quarantined", "undone")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument(
        "--exceptions", type=int, default=0, metavar="N", help="and so many in the live trainer"
    )
    parser.add_argument("--restores", type=int, default=0, metavar="N", help="so many of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="qwen3")
    parser.add_argument("--vllm-every", type=int, default=5, metavar="N", help="each N-th kill takes vLLM")
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill after so long")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the logs of both there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    figures, problems = soak(options)
    figures["problems"] = problems
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if problems else 0


def soak(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from soak_clients import CompletionStream, JobStream
    from soak_faults import hook_into
    from soak_kills import Killer, say
    from soak_system import SoakFailed, System, wait_for

    from apollo_ipc.demo.models import make_model
    from apollo_ipc.demo.real_model import copy_real_model
    from apollo_ipc.errors import ApolloError

    figures: dict[str, Any] = {"arch": options.arch, "seed": options.seed, "kills": 0}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="apollo-soak-", dir="/tmp") as base:
        say(f"making a {options.arch} model, starting vLLM")
        is_real, is_mixed = options.arch == "real", bool(options.exceptions or options.restores)
        model_dir = Path(base) / "model"
        if is_real:
            copy_real_model(model_dir)
        else:
            make_model(model_dir, ARCHITECTURES[options.arch])
        system = System(model_dir, Path(base), OF_REAL if is_real else None)
        if is_mixed:
            hook_into(system)
        jobs, completions = JobStream(system, options.seed, is_mixed), CompletionStream(system)
        try:
            figures["first_vllm_start_s"] = system.start_vllm()
            system.start_worker()
            system.wait_until_training()
            with completions:
                with jobs:
                    killer = Killer(system, options, problems, jobs)
                    figures |= killer.run()
                say("no more kills; waiting for the jobs")
                ids = {job_id for job_id, _ in jobs.acknowledged.values()}
                wait_for(lambda: has_ended(system.jobs(), ids), "the end of all jobs", 1200, 1.0)
                figures |= final_state(system, jobs, problems, killer)
            if figures["recoveries_s"]:
                say("a plain start of vLLM, to compare with")
                system.stop_vllm()
                figures["plain_vllm_start_s"] = system.start_vllm()
        except (SoakFailed, ApolloError, OSError) as error:
            problems.append(f"{type(error).__name__}: {error}")
            say(system.log_tail())
        finally:
            system.close()
            if options.logs:
                options.logs.mkdir(parents=True, exist_ok=True)
                for log in Path(base).glob("*.log"):
                    (options.logs / log.name).write_bytes(log.read_bytes())
        figures |= {
            "jobs_acknowledged": len(jobs.acknowledged),
            "submissions_repeated": jobs.num_retries,
            "completions_served": completions.num_served,
            "completions_failed": len(completions.failures),
            "completions_failed_while_vllm_was_down": completions.num_failed_while_down,
        }
        problems += jobs.problems + completions.failures[:10]
    return figures, problems


def has_ended(jobs: list[Any], ids: set[str]) -> bool:
    """Whether all of `ids` are known and have ended."""
    return ids <= {job.job_id for job in jobs if job.state in ENDED}


def final_state(system: Any, jobs: Any, problems: list[str], killer: Any) -> dict[str, Any]:
    """Syncs, stops the worker, and compares everything with everything. vLLM still runs."""
    import httpx
    from apollo_worker.model.compare import compare
    from apollo_worker.model.mapping import map_views, open_transport
    from soak_disk import steps_in_weights

    from apollo_ipc.checkpoint import verify
    from apollo_ipc.manifest import read_manifest

    answer = httpx.post(f"{system.server.url}/checkpoint", json={}, headers=system.headers, timeout=120)
    if answer.status_code != 200:
        problems.append(f"the last sync: {answer.status_code} {answer.text[:300]}")
    if (status := system.stop_worker()) != 0:
        problems.append(f"the worker ended with status {status}")
    manifest = read_manifest(system.server.runtime_dir)
    assert manifest is not None
    transport = open_transport(manifest)
    compared = compare(system.model_dir, map_views(manifest, transport))
    figures = judge_jobs(jobs.acknowledged, system.jobs(), problems, jobs.kinds, killer.restored)
    steps = steps_in_weights(system.model_dir)
    half_done = killer.half_done.of(10**9)
    expected = figures["steps_expected"] + half_done
    most = expected + figures["steps_of_cancelled_jobs"]
    figures |= {
        "steps_in_weights": steps,
        "steps_of_half_done_jobs": half_done,
        "checkpoint_equals_live": compared.is_equal and compared.num_equal > 0,
        "tensors_compared": compared.num_equal + len(compared.different),
        "verify_problems": len(found := verify(system.model_dir)),
        "steps_cut_off_in_log": system.count_in_log("was cut off"),
    }
    problems += [f"verify: {problem}" for problem in found[:5]]
    if not figures["checkpoint_equals_live"]:
        problems.append(f"live and disk differ: {compared.different[:5]}")
    if not expected <= steps <= most:
        problems.append(f"the weights have {steps} steps, the jobs {expected} to {most}")
        figures["jobs_applied_twice"] += max(0, steps - most)  # at most so many; which, is not to be seen
    return figures


def judge_jobs(
    acknowledged: dict[str, tuple[str, int]],
    jobs: list[Any],
    problems: list[str],
    kinds: dict[str, str] | None = None,
    restored: set[int] | None = None,
) -> dict:
    """jobs_lost: acknowledged, and not durable with all of its steps, though nobody cancelled it, it is no
    poison and no restore (to one of the versions `restored`) undid it. jobs_applied_twice: of one key. In
    order: each job began after the one before it had begun."""
    listed, by_key, num_lost = {job.job_id: job for job in jobs}, {}, 0
    for key, (job_id, steps) in acknowledged.items():
        job, kind = listed.get(job_id), (kinds or {}).get(key)
        is_done = job is not None and (job.state, job.steps_done) == ("durable", steps)
        is_undone = job is not None and job.state == "undone" and job.undone_by in (restored or ())
        is_own = job is not None and job.state == {"poison": "quarantined"}.get(kind or "", kind)
        if not (is_own or is_undone or (is_done and kind != "poison")):
            num_lost += 1
            found = f"{job.state}, {job.steps_done} of {steps} steps: {job.error}" if job else "unknown"
            problems.append(f"{key} ({job_id}): {found}")
    for job in jobs:
        by_key.setdefault(job.idempotency_key, []).append(job.job_id)
    twice = [ids for ids in by_key.values() if len(ids) > 1]
    problems += [f"one idempotency key, several jobs: {ids}" for ids in twice]
    return {
        "jobs_lost": num_lost,
        "jobs_applied_twice": len(twice),
        "jobs_out_of_order": num_out_of_order(jobs, problems),
        "jobs_undone": sum(job.state == "undone" for job in jobs),
        "jobs_cancelled": sum(job.state == "cancelled" for job in jobs),
        # In the weights, but where these went back to a checkpoint from before them.
        "steps_of_cancelled_jobs": sum(job.steps_done for job in jobs if job.state == "cancelled"),
        "jobs_durable": sum(job.state == "durable" for job in jobs),
        "jobs_quarantined": sum(job.state == "quarantined" for job in jobs),
        "steps_expected": sum(job.num_steps for job in jobs if job.state == "durable"),
    }


def num_out_of_order(jobs: list[Any], problems: list[str]) -> int:
    """Jobs that began for the first time before an earlier one had."""
    began = [job for job in sorted(jobs, key=lambda job: job.seq) if job.started_at is not None]
    wrong = [b for a, b in pairwise(began) if b.started_at < a.started_at]
    problems += [f"{job.job_id} began before an earlier job" for job in wrong]
    return len(wrong)


def show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", title=f"kill -9, {figures['kills']} times", show_header=False)
    for name, value in figures.items():
        if name != "problems":
            shown = f"{value:.1f}" if isinstance(value, float) else str(value)
            table.add_row(name.replace("_", " "), shown)
    console = Console()
    console.print(table)
    plain, recovery = figures.get("plain_vllm_start_s"), figures.get("recovery_after_vllm_kill_s")
    if plain and recovery:
        console.print(f"serving again {recovery - plain:+.1f} s over a plain start ({plain:.1f} s)")
    for problem in figures["problems"]:
        console.print(f"PROBLEM: {problem}", markup=False)
    console.print("everything as it must be" if not figures["problems"] else "NOT as it must be")


if __name__ == "__main__":
    sys.exit(main())
