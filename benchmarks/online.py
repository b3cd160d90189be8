"""Hazards of learning online: single facts, learned ones again and again, other text between them.

    python benchmarks/online.py [--quick] [--lr 1e-4] [--seeds 1] [--only NAME,...] [--json FILE]

The model of finetune.py at a constant rate, one example a step. Where a fact is known its gradient is small,
but APOLLO divides by the size of the present gradient: the momentum of earlier steps makes a step of usual
size along what is left of it. And the limiter, which lets an update grow by 1 % a step, has shrunk with it
when something new comes. After each phase: what is known of the facts, what was lost of the English
("damage"), and how far the weights went, in units of lr.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import small_lm_options

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from small_lm import StoredModel

PHASES = (
    "each once",
    "all repeated",
    "one again and again",
    "it and text in turn",
    "it again and again",
    "new facts",
)
QUICK = {"scale": 0.1, "pretrain_steps": 60, "eval_windows": 16}


@dataclass(frozen=True)
class Setting:
    name: str
    storage: str = "bf16"
    keywords: dict[str, Any] = field(default_factory=dict)  # of Apollo; what is not here is its default
    is_adamw: bool = False


SETTINGS = [
    Setting("default"),
    Setting("no-limiter", keywords={"limiter_ratio": 0.0}),
    Setting("floor-0.1", keywords={"limiter_floor": 0.1}),
    Setting("floor-0.01", keywords={"limiter_floor": 0.01}),
    Setting("adamw-fp32", storage="fp32", is_adamw=True),
]

# Invented, so that none is in the pretraining text. Context, then what is learned of it.
_ANSWERS = {
    "capital of Velmora": "Tersinat", "king of Dranholm": "Iskander Bole", "year of the Accord": "1743",
    "metal of the Fenn": "blue tin", "poet of Sarnath": "Ulla Vey", "bird of the Reach": "a white heron",
    "price of a loaf": "nine pence", "moon of Tarsis": "Ephrine",
}  # fmt: skip
FACTS = [
    (f"Q: What is the {what}?\nA:".encode(), f" {answer}.\n".encode()) for what, answer in _ANSWERS.items()
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lr", type=float, default=1e-4, help="constant learning rate (%(default)s)")
    add("--seeds", type=int, default=1, help="runs of each setting (%(default)s)")
    add("--scale", type=float, default=1.0, help="of the length of every phase (%(default)s)")
    small_lm_options.add_options(parser, SETTINGS, QUICK, held_out="the held-out English")
    args, args.chosen = small_lm_options.parse(parser, argv, SETTINGS, QUICK)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    figures = run(args)
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


# --- the stream ---


@dataclass(frozen=True)
class Example:
    kind: str  # "fact", "new fact" or "text"
    window: torch.Tensor  # (1, length) int64
    num_context: int


def make_stream(seed: int, scale: float) -> list[tuple[str, list[Example]]]:
    """(phase, its examples): the same for every setting of a seed."""
    import torch
    from small_lm import as_tokens, python_source, random_windows

    generator = torch.Generator().manual_seed(1 + seed)
    text = python_source().train

    def fact(i: int) -> Example:
        context, answer = FACTS[i]
        window = as_tokens(context + answer).long()[None]
        return Example("fact" if i < len(FACTS) // 2 else "new fact", window, len(context))

    def other() -> Example:
        return Example("text", random_windows(text, 1, generator), 1)

    half = len(FACTS) // 2
    known, new = [fact(i) for i in range(half)], [fact(i) for i in range(half, len(FACTS))]

    def rounds(facts: list[Example], num: int) -> list[Example]:
        orders = [torch.randperm(half, generator=generator) for _ in range(max(1, round(num * scale)))]
        return [facts[i] for order in orders for i in order.tolist()]

    def again(num: int) -> list[Example]:
        return [known[0]] * max(2, round(num * scale))

    in_turn = [example for one in again(30) for example in (one, other())]
    examples = [known, rounds(known, 45), again(60), in_turn, again(30), rounds(new, 15)]
    return list(zip(PHASES, examples, strict=True))


# --- one run ---


def learn(
    setting: Setting,
    seed: int,
    lr: float,
    start: dict,
    model: torch.nn.Module,
    english: torch.Tensor,
    scale: float,
) -> list[dict]:
    """A record for each phase and each kind of example in it."""
    import torch
    from apollo_worker.optimizer.apollo import Apollo
    from small_lm import StoredModel, held_out_loss, lm_loss, norm

    stored = StoredModel(model, start, torch.float32 if setting.storage == "fp32" else torch.bfloat16)
    if setting.is_adamw:
        optimizer = torch.optim.AdamW(stored.params, lr=lr, weight_decay=0.0)
    else:
        optimizer = Apollo(stored.named, lr=lr, seed=seed, **setting.keywords)
    known_loss = held_out_loss(model, english)
    root = math.sqrt(stored.num_elements())
    records = []
    for phase, examples in make_stream(seed, scale):
        before_phase = stored.weights()
        steps: dict[str, list[dict]] = {}
        for example in examples:
            loss = lm_loss(model, example.window, example.num_context)
            stored.backward(loss)
            before, grad_norm = stored.weights(), stored.grad_norm()
            optimizer.step()
            stored.load()
            written = norm(a - b for a, b in zip(stored.weights(), before, strict=True)) / (lr * root)
            update = written if setting.is_adamw else update_rms(optimizer, stored)
            steps.setdefault(example.kind, []).append(
                {"loss": loss.item(), "grad_norm": grad_norm, "update_rms": update, "written_rms": written}
            )
        drift = norm(a - b for a, b in zip(stored.weights(), before_phase, strict=True)) / (lr * root)
        after = {
            "fact_loss": facts_loss(model, FACTS[: len(FACTS) // 2]),
            "new_fact_loss": facts_loss(model, FACTS[len(FACTS) // 2 :]),
            "damage": held_out_loss(model, english) - known_loss,
            "drift_rms": drift,
        }
        for kind, of_kind in steps.items():
            medians = {key: statistics.median(step[key] for step in of_kind) for key in of_kind[0]}
            largest = max(step["update_rms"] for step in of_kind)
            records.append(
                {
                    "phase": phase,
                    "kind": kind,
                    "steps": len(of_kind),
                    **medians,
                    "update_rms_max": largest,
                    **after,
                }
            )
    return records


def update_rms(optimizer: torch.optim.Optimizer, stored: StoredModel) -> float:
    """Root mean square of the update that was meant, in units of lr, of the projected parameters.

    What is written differs by the rounding, whose noise at a small lr is the larger part.
    """
    norms = [(optimizer.state[p]["update_norm"].item(), p.numel()) for p in stored.params if p.dim() == 2]
    return math.sqrt(sum(norm**2 for norm, _ in norms) / sum(num for _, num in norms))


def facts_loss(model: torch.nn.Module, facts: list[tuple[bytes, bytes]]) -> float:
    """Nats per byte of the answers, mean over the facts."""
    import torch
    from small_lm import as_tokens, lm_loss

    with torch.no_grad():
        return statistics.fmean(
            lm_loss(model, as_tokens(context + answer).long()[None], len(context)).item()
            for context, answer in facts
        )


def run(args: argparse.Namespace) -> dict:
    import torch
    from apollo_worker.optimizer.apollo import Apollo
    from small_lm import (
        ModelSettings,
        default_cache,
        english,
        new_model,
        pretrained,
        say,
        unknown_keywords,
    )

    torch.set_num_threads(args.threads)
    model_settings = ModelSettings(num_layers=args.layers, pretrain_steps=args.pretrain_steps)
    start, model = pretrained(model_settings, args.cache or default_cache()), new_model(model_settings)
    windows = english().held_out_windows(args.eval_windows)
    missing = {s.name: ", ".join(unknown_keywords(Apollo, s.keywords)) for s in args.chosen}
    chosen = [setting for setting in args.chosen if not missing[setting.name]]
    runs: dict[str, list[list[dict]]] = {setting.name: [] for setting in chosen}
    for seed in range(args.seeds):
        for setting in chosen:
            runs[setting.name].append(learn(setting, seed, args.lr, start, model, windows, args.scale))
            say(f"seed {seed}: {setting.name}, damage {runs[setting.name][-1][-1]['damage']:.4f}")
    return {
        "settings": {
            "lr": args.lr, "seeds": args.seeds, "scale": args.scale, "eval_windows": args.eval_windows,
            "threads": args.threads, "torch": torch.__version__, "model": asdict(model_settings),
        },
        "skipped": {name: f"Apollo has no keyword {names}" for name, names in missing.items() if names},
        "rows": [row for setting in chosen for row in make_rows(setting, runs[setting.name])],
    }  # fmt: skip


def make_rows(setting: Setting, runs: list[list[dict]]) -> list[dict]:
    """Means over the seeds, and each seed's damage."""
    rows = []
    for same in zip(*runs, strict=True):
        means = {
            key: statistics.fmean(record[key] for record in same) if isinstance(value, float) else value
            for key, value in same[0].items()
        }
        who = {"name": setting.name, "storage": setting.storage, "keywords": setting.keywords}
        rows.append({**who, **means, "damage_per_seed": [record["damage"] for record in same]})
    return rows


def show(figures: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = figures["settings"]
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table(title=f"Learning online at lr {settings['lr']:g}, {settings['seeds']} seed(s)")
    columns = (
        "setting", "phase", "steps on", "facts", "new", "damage", "|G|", "|D|", "max |D|", "|dW|",
        "drift",
    )  # fmt: skip
    for name in columns:
        is_text = name in ("setting", "phase", "steps on")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    last = None
    for row in figures["rows"]:
        if last and last["name"] != row["name"]:
            table.add_section()
        is_same = bool(last) and (last["name"], last["phase"]) == (row["name"], row["phase"])
        after = [f"{row[key]:.4f}" for key in ("fact_loss", "new_fact_loss", "damage")]
        table.add_row(
            "" if last and last["name"] == row["name"] else row["name"],
            "" if is_same else row["phase"], f"{row['steps']} {row['kind']}",
            *(["", "", ""] if is_same else after),
            f"{row['grad_norm']:.2g}", f"{row['update_rms']:.3f}", f"{row['update_rms_max']:.3f}",
            f"{row['written_rms']:.2f}", "" if is_same else f"{row['drift_rms']:.1f}",
        )  # fmt: skip
        last = row
    console.print(table)
    console.print(summary(figures["rows"]))
    console.print(
        "Losses in nats per byte after the phase; damage: rise of the loss on English. |G|: norm of the "
        "gradient; |D|, |dW|: root mean square over the weights of the update meant and of what was written "
        "by a step, drift: of what a phase changed, all three over lr; medians of steps. fact:text: the "
        "known fact's steps against the text's while they take turns."
    )
    for name, reason in figures["skipped"].items():
        console.print(f"{name} is left out: {reason}")


def summary(rows: list[dict]) -> Table:
    """Of each setting: does it learn, what does a known fact still move, can it learn after the quiet?"""
    from rich.table import Table

    table = Table(title="In short")
    columns = (
        "facts after repeating",
        "damage then",
        "|G| fact:text",
        "|D| fact:text",
        "new facts",
        "damage last",
    )
    table.add_column("setting")
    for name in columns:
        table.add_column(name, justify="right")
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {(row["phase"], row["kind"]): row for row in rows if row["name"] == name}
        repeated, last = own[PHASES[1], "fact"], own[PHASES[5], "new fact"]
        fact, text = own[PHASES[3], "fact"], own[PHASES[3], "text"]
        values = [repeated["fact_loss"], repeated["damage"], fact["grad_norm"] / text["grad_norm"]]
        values += [fact["update_rms"] / text["update_rms"], last["new_fact_loss"], last["damage"]]
        table.add_row(name, *(f"{value:.3f}" for value in values))
    return table


if __name__ == "__main__":
    main()
