"""gpu_loop.py's figures as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

LOAD = (
    ("TTFT p50, ms", "ttft_p50_s"), ("TTFT p99, ms", "ttft_p99_s"), ("TPOT p50, ms", "tpot_p50_s"),
    ("TPOT p99, ms", "tpot_p99_s"), ("longest wait for a token, ms", "wait_max_s"),
)  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    console = Console(width=110)
    options = figures["options"]
    console.rule(f"{options['preset']} {options['arch']}, {'eager' if figures.get('is_eager') else 'graphs'}")
    console.print(", ".join(f"{k} {v}" for k, v in figures.get("machine", {}).items() if v), markup=False)
    for title, rows in (("the loop", _loop_rows(figures)), ("one step alone", _step_rows(figures))):
        if rows:
            table = Table("", "", title=title, show_header=False)
            for name, value in rows:
                table.add_row(name, value)
            console.print(table)
    if load := figures.get("load"):
        console.print(_load_table(load, figures["load_settings"]))
    if sync := figures.get("sync"):
        console.print(_sync_table(sync))
    for name, why in figures.get("not_measured", {}).items():
        console.print(f"not measured: {name}: {why}", markup=False)
    for name, phase in figures.get("load", {}).items():
        for error in phase["errors"]:
            console.print(f"FAILED REQUEST {name}: {error}", markup=False)
    if problem := figures.get("problem"):
        console.print(f"PROBLEM: {problem}", markup=False)


def _loop_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("parameters, weights", f"{figures['parameters']:,}, {as_mb(figures['weight_bytes'])}")
    ] if "parameters" in figures else []  # fmt: skip
    if attached := figures.get("attach"):
        mapped = f"{attached['parameters_mapped']} of {attached['parameters']}"
        rows += [
            ("vLLM's start", as_s(figures["vllm_start_s"])),
            ("parameters mapped", f"{mapped}, {attached['refused']} refusals"),
            ("segments opened", f"{attached['segments_opened']} ({attached['transport']})"),
            (
                "attach",
                f"{as_s(attached['attach_s'])} (worker's start to it: {as_s(attached['worker_start_s'])})",
            ),
        ]
    if clients := figures.get("mps_clients"):
        rows.append(("MPS clients, and the worker's limits", f"{clients}; {_mps_limits(figures['options'])}"))
    if memory := figures.get("memory"):
        rows += [
            ("memory is", memory["source"]),
            ("a CUDA context alone", as_mb(memory["cuda_context_bytes"])),
            ("the worker adds before the first step", as_mb(memory["added_before_first_step_bytes"])),
        ]
        if (share := memory.get("beyond_over_weights")) is not None:
            rows.append(("  of it beyond a context, over the weights", f"{share:.2%}"))
        if (peak := memory.get("peak_training_bytes")) is not None:
            plan = f"{as_mb(memory['planned_training_bytes'])} planned: {memory['peak_over_plan']:.2f}"
            rows.append(("training's peak", f"{as_mb(peak)}, {plan} of it"))
    if served := figures.get("served_logprob"):
        rows.append(("target's served logprob a token", f"{served['before']:.3f} -> {served['after']:.3f}"))
    for name, key in (("idle server", "train_beside_idle_server"), ("load", "train_under_load")):
        if jobs := figures.get(key):
            whole = f"{as_s(jobs['step_with_overhead_s'])} with tokenising and publishing"
            rows.append(
                (f"a step beside {name}", f"{as_s(jobs['step_s'])}, {whole}: {jobs['num_steps']} steps")
            )
            rows.append((f"last step to applied, beside {name}", as_s(jobs["applied_after_last_step_s"])))
    if drop := figures.get("cache_drop_under_load"):
        numbers = f"median {as_s(drop['median_s'])}, most {as_s(drop['max_s'])}"
        rows.append(("prefix cache dropped under load", f"{numbers} ({drop['num']} times)"))
    return rows


def _mps_limits(options: dict[str, Any]) -> str:
    share, has_low_priority = options["mps_thread_percentage"], options["mps_priority"]
    limits = [f"{share}% of the threads"] if share is not None else []
    limits += ["priority below normal"] if has_low_priority else []
    return ", ".join(limits) or "none"


def _step_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    if not (step := figures.get("step_alone")):
        return []
    floor = f"{step['optimizer_over_floor']:.1f} times its floor of {as_s(step['optimizer_floor_s'])}"
    return [
        ("whole", f"{as_s(step['step_s'])} for {step['num_tokens']} tokens"),
        ("forward and loss", as_s(step["forward_s"])),
        ("backward", as_s(step["backward_s"])),
        ("optimizer", f"{as_s(step['optimizer_s'])}, {floor}"),
        ("bandwidth", f"{step['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"),
        ("optimizer's state", as_mb(step["optimizer_state_bytes"])),
        ("peak of torch's tensors", as_mb(step["step_peak_allocated_bytes"])),
    ]


def _load_table(load: dict[str, Any], settings: dict[str, Any]) -> Table:
    title = (
        f"{settings['rate']:g} requests/s, {settings['prompt_tokens']} + {settings['output_tokens']} tokens, "
        f"{settings['rounds']} phases of {settings['seconds']:g} s each way"
    )
    table = Table("", *load, "ratio", title=title)
    for name, key in LOAD:
        values = [phase[key] for phase in load.values()]
        ratio = f"{values[1] / values[0]:.2f}" if all(values) else "-"
        table.add_row(name, *("-" if v is None else f"{v * 1e3:.1f}" for v in values), ratio)
    table.add_row("requests", *(str(phase["num_requests"]) for phase in load.values()), "")
    table.add_row("failed", *(str(phase["num_failed"]) for phase in load.values()), "")
    return table


def _sync_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("sync", "seconds", "training waited", "changed", "written", "out of the weights", "to disk")
    for row in rows:
        out = row["copied_out_bytes_per_s"]
        table.add_row(
            *(row["name"], f"{row['duration_s']:.2f}", f"{row['training_waited_s']:.2f}"),
            *(as_mb(row["bytes_changed"]), as_mb(row["bytes_written"])),
            "-" if out is None else f"{out / 1e9:.2f} GB/s",
            f"{row['written_bytes_per_s'] / 1e9:.2f} GB/s",
        )
    return table


def as_s(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds * 1e3:.1f} ms"


def as_mb(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:,.0f} MB"
