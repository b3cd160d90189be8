"""Quality of the optimizers: a small model fine-tuned on text that is new to it.

    python benchmarks/finetune.py [--quick] [--seeds 3] [--only NAME,...] [--json FILE] [--plot FILE]

A two-layer Qwen3 over bytes knows the language reference's English and learns Python's own source, one
example of 128 bytes a step, cosine with 10 % warm-up. Every contestant of a seed sees the same examples in
the same order; a seed decides these, the projections and the roundings. SGD's learning rate is the best of a
grid on the very held-out text of the table, at a seed of its own: more care than any other contestant got.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import small_lm_options
from finetune_contestants import CONTESTANTS, NEAREST, REFERENCE, STOCHASTIC, Contestant

if TYPE_CHECKING:
    from finetune_train import Outcome, Task

SGD_GRID = (0.003, 0.01, 0.03, 0.1)
SGD_TUNING_SEED = 1000
CLAIM = 0.01  # stochastic bf16 ends within this share of fp32's loss
QUICK = {"steps": 30, "seeds": 1, "pretrain_steps": 60, "eval_windows": 16}


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=300, help="examples learned in a run (%(default)s)")
    add("--seeds", type=int, default=3, help="runs of each contestant at each rate (%(default)s)")
    add("--lr", type=float, nargs="+", default=[1e-5, 1e-4], help="peak learning rates (1e-5 1e-4)")
    add("--evals", type=int, default=6, help="points of the loss curve after the first (%(default)s)")
    add("--plot", type=Path, help="draw the loss curves to this .png (needs matplotlib)")
    small_lm_options.add_options(parser, CONTESTANTS, QUICK, held_out="each held-out text")
    args, args.contestants = small_lm_options.parse(parser, argv, CONTESTANTS, QUICK)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    figures = run(args)
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.plot:
        from finetune_plot import plot

        plot(figures, args.plot)


def run(args: argparse.Namespace) -> dict:
    import torch
    from finetune_train import Task, train, why_skipped
    from small_lm import ModelSettings, default_cache, english, new_model, pretrained, python_source, say

    torch.set_num_threads(args.threads)
    model_settings = ModelSettings(num_layers=args.layers, pretrain_steps=args.pretrain_steps)
    weights = pretrained(model_settings, args.cache or default_cache())
    new, old = python_source(), english()
    task = Task(
        weights=weights,
        model=new_model(model_settings),
        text=new.train,
        new_windows=new.held_out_windows(args.eval_windows),
        old_windows=old.held_out_windows(args.eval_windows),
        num_steps=args.steps,
        num_evals=min(args.evals, args.steps),
    )

    reasons = {contestant: why_skipped(contestant) for contestant in args.contestants}
    contestants = [contestant for contestant, reason in reasons.items() if reason is None]
    sgd = tune_sgd(contestants, task, train)
    outcomes: dict[tuple[Contestant, float], list[Outcome]] = {}
    for seed in range(args.seeds):
        for contestant in contestants:
            for lr in [sgd["lr"]] if contestant.optimizer == "sgd" and sgd else args.lr:
                outcome = train(contestant, lr, seed, task)
                outcomes.setdefault((contestant, lr), []).append(outcome)
                say(f"seed {seed}, lr {lr:g}: {contestant.name} {outcome.held_out_loss:.4f}")
    reference = {lr: runs for (contestant, lr), runs in outcomes.items() if contestant.name == REFERENCE}
    rows = [make_row(who, lr, runs, reference.get(lr)) for (who, lr), runs in outcomes.items()]
    return {
        "settings": {
            "steps": args.steps, "seeds": args.seeds, "lr": args.lr, "batch": 1, "schedule": "cosine",
            "eval_windows": args.eval_windows, "threads": args.threads, "torch": torch.__version__,
            "num_parameters": sum(weight.numel() for weight in weights.values()),
            "model": asdict(model_settings), "sgd_tuning": sgd,
        },
        "skipped": {c.name: reason for c, reason in reasons.items() if reason is not None},
        "rows": rows,
        "verdicts": [verdict for lr in args.lr if (verdict := judge(rows, lr))],
    }  # fmt: skip


def tune_sgd(contestants: list[Contestant], task: Task, train: Callable[..., Outcome]) -> dict | None:
    """The rate of SGD_GRID with the least held-out loss at SGD_TUNING_SEED; None where SGD does not run."""
    sgd = next((c for c in contestants if c.optimizer == "sgd"), None)
    if sgd is None:
        return None
    losses = {lr: train(sgd, lr, SGD_TUNING_SEED, task).held_out_loss for lr in SGD_GRID}
    best = min(losses, key=lambda lr: (losses[lr] != losses[lr], losses[lr]))  # NaN is never the least
    return {
        "lr": best, "seed": SGD_TUNING_SEED, "held_out_loss": {str(lr): loss for lr, loss in losses.items()},
        "is_at_edge": best in (min(SGD_GRID), max(SGD_GRID)),
    }  # fmt: skip


def make_row(contestant: Contestant, lr: float, runs: list[Outcome], against: list[Outcome] | None) -> dict:
    """against: our own fp32's runs at this lr, to which each seed's loss, and its fall, is in a ratio."""
    ratios, kept = None, None
    if against is not None:
        pairs = list(zip(runs, against, strict=True))
        ratios = [own.held_out_loss / fp32.held_out_loss for own, fp32 in pairs]
        kept = [(own.curve[0] - own.curve[-1]) / (fp32.curve[0] - fp32.curve[-1]) for own, fp32 in pairs]
    return {
        **asdict(contestant), "lr": lr, "seeds": len(runs),
        **mean_and_std("held_out_loss", [run.held_out_loss for run in runs]),
        **mean_and_std("gain", [run.curve[0] - run.curve[-1] for run in runs]),
        **mean_and_std("forgetting", [run.forgetting for run in runs]),
        "ratio_to_fp32": statistics.fmean(ratios) if ratios else None,
        "ratio_to_fp32_per_seed": ratios,
        "gain_kept": statistics.fmean(kept) if kept else None,
        "state_bytes": runs[0].state_bytes,
        "s_per_step": statistics.median(run.s_per_step for run in runs),
        "cpu_s_per_step": statistics.median(run.cpu_s_per_step for run in runs),
        "optimizer_cpu_s_per_step": statistics.median(run.optimizer_cpu_s for run in runs),
        "curves": [run.curve for run in runs],
        "curve_steps": runs[0].curve_steps,
    }  # fmt: skip


def mean_and_std(name: str, values: list[float]) -> dict[str, float | None]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {f"{name}_mean": statistics.fmean(values), f"{name}_std": std}


def judge(rows: list[dict], lr: float) -> dict | None:
    """The claim at `lr`, at the worst of the seeds; None where it was not measured."""
    here = {row["name"]: row for row in rows if row["lr"] == lr}
    if REFERENCE not in here or STOCHASTIC not in here:
        return None
    stochastic, nearest = here[STOCHASTIC], here.get(NEAREST)
    worst = max(stochastic["ratio_to_fp32_per_seed"], key=lambda ratio: abs(ratio - 1))
    return {
        "lr": lr, "claim": CLAIM, "holds": abs(worst - 1) <= CLAIM, "worst_ratio": worst,
        "stochastic_ratio": stochastic["ratio_to_fp32"],
        "stochastic_gain_kept": stochastic["gain_kept"],
        "nearest_ratio": nearest and nearest["ratio_to_fp32"],
        "nearest_gain_kept": nearest and nearest["gain_kept"],
    }  # fmt: skip


def show(figures: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    settings, console = figures["settings"], Console(width=None if sys.stdout.isatty() else 130)
    console.print(
        f"{settings['num_parameters']:,} parameters, {settings['steps']} steps of one example, "
        f"{settings['seeds']} seeds; loss in nats per byte; to fp32: loss and fall of the loss, "
        f"each over {REFERENCE}'s of the same seed and lr; ms of a step, of which CPU, of which the update"
    )
    columns = (
        "optimizer", "lr", "held-out loss", "to fp32", "gain kept", "forgetting", "state MB", "ms",
        "CPU ms", "update",
    )  # fmt: skip
    table = Table(title="Fine-tuning on text that is new to the model")
    for name in columns:
        table.add_column(name, justify="left" if name == "optimizer" else "right", no_wrap=True)
    for lr in sorted({row["lr"] for row in figures["rows"]}):
        for row in (row for row in figures["rows"] if row["lr"] == lr):
            ratio, kept = row["ratio_to_fp32"], row["gain_kept"]
            table.add_row(
                row["name"], f"{lr:g}", with_std(row, "held_out_loss"),
                "" if ratio is None else f"{ratio:.4f}", "" if kept is None else f"{kept:.1%}",
                with_std(row, "forgetting"), f"{row['state_bytes'] / 1e6:.2f}",
                *(f"{row[f'{key}s_per_step'] * 1e3:.0f}" for key in ("", "cpu_", "optimizer_cpu_")),
            )  # fmt: skip
        table.add_section()
    console.print(table)
    for name, reason in figures["skipped"].items():
        console.print(f"{name} is left out: {reason}")
    if sgd := settings["sgd_tuning"]:
        losses = ", ".join(f"{lr}: {loss:.3f}" for lr, loss in sgd["held_out_loss"].items())
        edge = "; the best is at the grid's edge" if sgd["is_at_edge"] else ""
        console.print(f"SGD's lr, tuned at seed {sgd['seed']} on this held-out text: {losses}{edge}")
    for v in figures["verdicts"]:
        ratio, kept = v["nearest_ratio"], v["nearest_gain_kept"]
        console.print(
            f"lr {v['lr']:g}: bf16 stochastic ends at {v['stochastic_ratio']:.4f} of fp32's loss, at worst "
            f"{v['worst_ratio']:.4f}, with {v['stochastic_gain_kept']:.0%} of the gain; nearest "
            + (f"at {ratio:.4f}, with {kept:.0%}" if ratio else "was not run")
            + f". Stochastic within {v['claim']:.0%}: {'yes' if v['holds'] else 'NO'}"
        )


def with_std(row: dict, name: str) -> str:
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


if __name__ == "__main__":
    main()
