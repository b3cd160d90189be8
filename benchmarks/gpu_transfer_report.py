"""gpu_transfer.py's figures as tables."""

from __future__ import annotations

from typing import Any

from gpu_loop_report import LOAD, as_mb, as_s
from rich.console import Console
from rich.table import Table


def show(figures: dict[str, Any]) -> None:
    console = Console(width=110)
    options = figures["options"]
    console.rule(f"{options['preset']} {options['arch']}, {'eager' if figures.get('is_eager') else 'graphs'}")
    console.print(", ".join(f"{k} {v}" for k, v in figures.get("machine", {}).items() if v), markup=False)
    if "in_place" in figures:
        console.print(_update_table(figures))
    if load := figures.get("load"):
        console.print(_load_table(load, figures["load_settings"]))
    for name, value in figures.get("served_logprob", {}).items():
        console.print(f"target's served logprob a token {name}: {value:.3f}", markup=False)
    for name, why in figures["not_measured"].items():
        console.print(f"not measured: {name}: {why}", markup=False)
    for name, phase in figures.get("load", {}).items():
        for error in phase["errors"]:
            console.print(f"FAILED REQUEST {name}: {error}", markup=False)
    if problem := figures.get("problem"):
        console.print(f"PROBLEM: {problem}", markup=False)


def _update_table(figures: dict[str, Any]) -> Table:
    ours, copy, memory = figures["in_place"], figures.get("full_copy", {}), figures["memory"]
    per_s = copy.get("bytes_per_s")
    parts = ("pause", "start", "describe", "update", "finish", "resume")
    table = Table(
        "an update", "in place", f"full copy ({figures['backend']}, pause {copy.get('pause', '-')})"
    )
    for row in (
        ("number", str(ours["num_updates"]), str(copy.get("num_updates", "-"))),
        ("bytes sent", "0 MB", as_mb(copy.get("bytes"))),
        ("bytes a second, of update_weights", "-", "-" if per_s is None else f"{per_s / 1e9:.2f} GB/s"),
        ("serving waits for it, median", as_s(ours["cache_drop_median_s"]), as_s(copy.get("held_s"))),
        ("serving waits for it, most", as_s(ours["cache_drop_max_s"]), as_s(copy.get("held_max_s"))),
        *((f"  of it {part}", "", as_s(copy.get(f"{part}_s"))) for part in parts),
        ("a training step", as_s(ours["step_s"]), "none is done"),
        ("memory before any update", as_mb(memory["added_before_first_step_bytes"]),
         as_mb(copy.get("added_bytes"))),
        ("  of it a CUDA context", *[as_mb(memory["cuda_context_bytes"])] * 2),
        ("memory at most (ours trains)", as_mb(ours["peak_training_bytes"]),
         as_mb(copy.get("peak_added_bytes"))),
    ):  # fmt: skip
        table.add_row(*row)
    return table


def _load_table(load: dict[str, Any], settings: dict[str, Any]) -> Table:
    title = (
        f"{settings['rate']:g} requests/s, {settings['prompt_tokens']} + {settings['output_tokens']} tokens, "
        f"{settings['seconds']:g} s each"
    )
    table = Table("", *load, title=title)
    for name, key in LOAD:
        values = [phase[key] for phase in load.values()]
        table.add_row(name, *("-" if value is None else f"{value * 1e3:.1f}" for value in values))
    for name, key in (("requests", "num_requests"), ("failed", "num_failed")):
        table.add_row(name, *(str(phase[key]) for phase in load.values()))
    return table
