"""Seconds for many short examples: a step each, an update of a pass each, and an update that shares passes.

    python benchmarks/packing.py [--examples 64] [--tokens 50] [--rounds 3] [--json FILE]

The real model's directory is copied and trained without a server. The three take turns, a round each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import load_offline
from apollo_worker.step import step
from apollo_worker.step.step import Trainer

from apollo_ipc.config import Train
from apollo_ipc.demo.real_model import copy_real_model

LEARNING_RATE = 1e-6


def main(argv: list[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=50, help="of each example, half of them targets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="apollo-packing-") as directory:
        figures = run(args, copy_real_model(Path(directory) / "model"))
    for name, seconds in figures["median_s"].items():
        rate = figures["examples"] * figures["tokens"] / seconds
        print(f"{name:36} {seconds:7.2f} s  {rate:6.0f} tokens/s  {figures['times_of_packed'][name]:5.2f}x")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def run(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    trainer = Trainer(load_offline(model_dir), Train())
    generator = torch.Generator().manual_seed(0)
    half = args.tokens // 2
    examples = [
        TokenisedExample(
            torch.randint(100, 40000, (args.tokens,), generator=generator).tolist(),
            [False] * half + [True] * (args.tokens - half),
        )
        for _ in range(args.examples)
    ]
    packed, seconds = step.pack, {name: [] for name in ("a step each", "one update, a pass each", "packed")}

    def a_step_each() -> None:
        for example in examples:
            trainer.step(example, LEARNING_RATE)

    def a_pass_each() -> None:
        step.pack = lambda lengths, _: [[i] for i in range(len(lengths))]
        trainer.step_on(examples, LEARNING_RATE)

    def in_few_passes() -> None:
        step.pack = packed
        trainer.step_on(examples, LEARNING_RATE)

    ways: dict[str, Callable[[], None]] = dict(
        zip(seconds, (a_step_each, a_pass_each, in_few_passes), strict=True)
    )
    trainer.step_on(examples[:2], LEARNING_RATE)  # makes the optimizer's state and compiles
    for _ in range(args.rounds):
        for name, one in ways.items():
            started = time.perf_counter()
            one()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name:36} {seconds[name][-1]:7.2f} s", flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "examples": args.examples,
        "tokens": args.tokens,
        "num_passes": len(packed([args.tokens] * args.examples, trainer.options.max_tokens)),
        "seconds": seconds,
        "median_s": median,
        "times_of_packed": {name: value / median["packed"] for name, value in median.items()},
    }


if __name__ == "__main__":
    main()
