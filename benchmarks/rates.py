"""What a learning rate does to the real model: five facts at once, and a night of 500 examples.

Both are trained in one process by the worker's own optimizer and loss (benchmarks/learning_model.py), one
example an update unless a run says otherwise; then taught questions, others for the same, and general ones
are asked (benchmarks/learning.py's, those that the model answers right before). A run is a job and options;
FILE keeps the rows of earlier calls, so that a long table can be made in pieces.

    python benchmarks/rates.py five:lr=1e-4,epochs=4,schedule=constant night:lr=3e-5 --json rates.json
    python benchmarks/rates.py five:lr=1e-4,epochs=8,limiter_ratio=0 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import learning_data as data
import msgspec
from learning import Before, add_model_options, look_after, opened, say
from rates_night import night

from apollo_ipc.config import Train
from apollo_ipc.wire.requests import Example, Message, TrainOptions, TrainRequest

if TYPE_CHECKING:
    from apollo_worker.jobs.job_plan import JobPlan
    from learning_model import OfflineModel

NIGHT_EXAMPLES, NIGHT_ASKED, LOSS_EXAMPLES = 500, 24, 16
COLUMNS = ("loss", "taught", "paraphrased", "near", "general", "kl", "english", "steps", "seconds")


class Run(msgspec.Struct, frozen=True):
    """job: "five" or "night". options: of the job; train: of the configuration (the limiter, the rank)."""

    name: str
    job: str
    options: TrainOptions
    train: dict[str, Any]


def main() -> int:
    options = parse_arguments()
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    model, before = opened(options)
    for run in options.runs:
        for seed in options.seeds:
            rows.append(measure(model, before, run, seed))
            say(json.dumps({k: v for k, v in rows[-1].items() if k != "answers"}))
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    print_table(rows)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=run_of, metavar="JOB[:NAME=VALUE,...]", help="five or night, and its options")
    add("--seeds", type=int, nargs="+", default=[0], help="which facts, their order, and the rounding")
    add_model_options(parser)
    add("--json", type=Path, metavar="FILE", help="rows are added to those that it has")
    return parser.parse_args()


def run_of(text: str) -> Run:
    """ "five:lr=1e-4,limiter_ratio=0"; what is no option of a job is one of the section [train]."""
    job, _, given = text.partition(":")
    if job not in JOBS:
        raise argparse.ArgumentTypeError(f"{job!r} is none of {', '.join(JOBS)}")
    values = dict(pair.split("=", 1) for pair in given.split(",") if pair)
    own = {name: values.pop(name) for name in list(values) if name in TrainOptions.__struct_fields__}
    train = msgspec.to_builtins(msgspec.convert(values, Train, strict=False))
    return Run(text, job, msgspec.convert(own, TrainOptions, strict=False), {k: train[k] for k in values})


def five(seed: int) -> tuple[list[tuple[str, str]], list[data.BenchFact]]:
    facts = data.chosen(data.facts_of("first"), 5, seed)
    return [(fact.taught.text, fact.answer) for fact in facts], facts


def five_hundred(seed: int) -> tuple[list[tuple[str, str]], list[data.BenchFact]]:
    pairs, facts = night(NIGHT_EXAMPLES, seed)
    return pairs, facts[:NIGHT_ASKED]


JOBS = {"five": five, "night": five_hundred}


def measure(model: OfflineModel, before: Before, run: Run, seed: int) -> dict[str, Any]:
    pairs, facts = JOBS[run.job](seed)
    messages = [[Message("user", question), Message("assistant", answer)] for question, answer in pairs]
    defaults = model.config
    train = msgspec.structs.replace(defaults.train, **run.train)
    model.config = msgspec.structs.replace(defaults, train=train)
    model.reset(seed)
    todo = model.plan(TrainRequest([Example(messages=some) for some in messages], run.options))
    first, started = loss_of(model, todo), time.monotonic()
    model.train_plan(todo)
    seconds = round(time.monotonic() - started, 1)
    model.config = defaults
    row = {"name": run.name, "seed": seed, "schedule": todo.schedule, "first_loss": first}
    row |= {"loss": loss_of(model, todo), "steps": todo.num_steps, "seconds": seconds}
    return row | look_after(model, before, facts)


def loss_of(model: OfflineModel, todo: JobPlan) -> float:
    """Nats a token, of some that are trained."""
    losses = [-one.mean() for one in model.trainer.logprobs_of(todo.examples[:LOSS_EXAMPLES])]
    return round(float(sum(losses)) / len(losses), 3)


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| run | seed | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 2))
    for row in rows:
        cells = [f"{v[0]}/{v[1]}" if isinstance(v := row[name], list) else f"{v:g}" for name in COLUMNS]
        print(f"| {row['name']} | {row['seed']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
