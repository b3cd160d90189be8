"""Seconds for many short examples: a step each; one update of a pass each, padded rows, shared beginnings.

    python benchmarks/packing.py [--examples 24] [--tokens 50] [--shared 24] [--rounds 3] [--json FILE]
    python benchmarks/packing.py --examples 8 --tokens 500 --shared 400    # a group of GRPO, say

The real model's directory is copied and trained without a server. The four take turns, a round each. Its chat
template begins each conversation with 24 tokens that are the same.
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
from apollo_worker.step.packing import PackedRow, packed
from apollo_worker.step.step import Trainer

from apollo_ipc.config import Train
from apollo_ipc.demo.real_model import copy_real_model

LEARNING_RATE = 1e-6


def main(argv: list[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=50, help="of each example (%(default)s)")
    parser.add_argument("--shared", type=int, default=24, help="of them, that all begin with (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="apollo-packing-") as directory:
        figures = run(args, copy_real_model(Path(directory) / "model"))
    for name, seconds in figures["median_s"].items():
        rate = figures["examples"] * figures["tokens"] / seconds
        print(f"{name:36} {seconds:7.2f} s  {rate:6.0f} tokens/s  {figures['times_of_shared'][name]:5.2f}x")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def run(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    trainer = Trainer(load_offline(model_dir), Train())
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(100, 40000, (args.shared,), generator=generator).tolist()
    num_own = args.tokens - args.shared
    num_targets = num_own // 2
    examples = [
        TokenisedExample(
            beginning + torch.randint(100, 40000, (num_own,), generator=generator).tolist(),
            [False] * (args.tokens - num_targets) + [True] * num_targets,
        )
        for _ in range(args.examples)
    ]
    names = ("a step each", "one update, a pass each", "padded rows", "shared beginnings")
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def a_step_each() -> None:
        for example in examples:
            trainer.step(example, LEARNING_RATE)

    def update(layouts: Callable[..., Any]) -> Callable[[], None]:
        def one() -> None:
            step.packed = layouts  # pyright: ignore[reportPrivateImportUsage]
            trainer.step_on(examples, LEARNING_RATE)

        return one

    def a_pass_each(some: list[TokenisedExample], *_: object) -> list[list[PackedRow]]:
        return [[PackedRow([at], 0, len(one.input_ids))] for at, one in enumerate(some)]

    def padded(some: list[TokenisedExample], max_tokens: int, *_: object) -> list[list[PackedRow]]:
        return packed(some, max_tokens)

    does = (a_step_each, update(a_pass_each), update(padded), update(packed))
    ways: dict[str, Callable[[], None]] = dict(zip(names, does, strict=True))
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
        "shared": args.shared,
        "num_passes": len(trainer._packed(examples)),
        "seconds": seconds,
        "median_s": median,
        "times_of_shared": {name: value / median["shared beginnings"] for name, value in median.items()},
    }


if __name__ == "__main__":
    main()
