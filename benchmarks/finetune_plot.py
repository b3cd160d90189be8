"""Part of finetune.py: the loss curves."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from finetune_contestants import REFERENCE

# name -> (colour, line); what shares a colour differs only in how it is written. Okabe and Ito's colours.
LINES = {
    "adamw-fp32": ("#000000", "--"),
    "sgd-fp32": ("#000000", ":"),
    "apollo-torch-bf16": ("#D55E00", "--"),
    "apollo-fp32": ("#CCCCCC", "-"),
    "apollo-nearest": ("#E69F00", "-"),
    "apollo-stochastic": ("#0072B2", "-"),
    "apollo-kahan": ("#56B4E9", "--"),
    "apollo-rank-16": ("#009E73", "-"),
    "apollo-rank-1": ("#009E73", ":"),
    "apollo-block-sign": ("#CC79A7", "--"),
    "apollo-limiter-off": ("#CC3311", "-"),
}


def plot(figures: dict, path: Path) -> None:
    """A column a learning rate. Above: mean over the seeds and their spread; below: paired to our fp32."""
    rates = figures["settings"]["lr"]
    fig, axes = plt.subplots(
        2, len(rates), figsize=(5.5 * len(rates) + 2, 7.5), squeeze=False, sharex=True, layout="constrained"
    )
    for (loss, gap), lr in zip(axes.T, rates, strict=True):
        rows = [row for row in figures["rows"] if row["lr"] == lr or row["optimizer"] == "sgd"]
        reference = next((row["curves"] for row in rows if row["name"] == REFERENCE), None)
        for row in rows:
            band(loss, row, row["curves"])
            if reference:
                paired = zip(row["curves"], reference, strict=True)
                percent = [[(a / b - 1) * 100 for a, b in zip(*pair, strict=True)] for pair in paired]
                band(gap, row, percent)
        loss.set(title=f"lr {lr:g}", ylabel="held-out loss (nats per byte)")
        gap.set(xlabel="steps of one example", ylabel=f"above {REFERENCE} (%)")
        gap.axhspan(-1, 1, color="#EEEEEE", zorder=0, label="within 1 %")
        for axis in (loss, gap):
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.01)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False)
    seeds = figures["settings"]["seeds"]
    fig.suptitle(f"Fine-tuning a small model: mean of {seeds} seed(s), band ± 1 standard deviation")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def band(axis, row: dict, curves: list[list[float]]) -> None:
    color, line = LINES[row["name"]]
    points = list(zip(*curves, strict=True))
    mean = [statistics.fmean(values) for values in points]
    std = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in points]
    # Many lie on one another: the reference wide and below, broken lines above unbroken ones.
    width, zorder = (5.0, 2) if row["name"] == REFERENCE else (1.6, 3 if line == "-" else 4)
    axis.plot(row["curve_steps"], mean, line, color=color, label=row["name"], linewidth=width, zorder=zorder)
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axis.fill_between(row["curve_steps"], low, high, color=color, alpha=0.15, linewidth=0)
