"""Random input at every door: bodies at the routes, frames at the worker's socket, bytes in its files.

A real worker on a small model whose weights another process shares as vLLM does; the routes run in this
process. Bodies come from a grammar, right or with something wrong; the same for messages and files. Counted
by kind and outcome. A problem: a process that ended, an answer with 500 or with a traceback, an answer that
takes too long, a body taken that must be refused or refused that must be taken, a file's damage that is
trusted; and every so often a plain job must be trained.

    python benchmarks/fuzz.py --minutes 120 --seed 1 --json fuzz.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DOORS = ("routes", "socket", "files")
LOOK_EVERY = 300  # inputs
START_S = 400.0  # on a machine that does other things


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, metavar="N", help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=DOORS, help="one door instead of all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    figures = fuzz(options)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if figures["num_problems"] else 0


def fuzz(options: argparse.Namespace) -> dict[str, Any]:
    from fuzz_system import Findings

    tally = Findings()
    with tempfile.TemporaryDirectory(prefix="apollo-fuzz-", dir="/tmp") as base:
        doors = [options.only] if options.only else [*DOORS]
        Path(base, "live").mkdir()
        if doors == ["files"]:
            started = files_only(Path(base), options, tally)
        else:
            started = at_all_doors(Path(base), doors, options, tally)
    return {
        "seed": options.seed,
        "minutes": (time.monotonic() - started) / 60,
        "num_inputs": tally.num_inputs,
        "num_problems": tally.num_problems,
        "slowest_answer_s": tally.slowest_s,
        "slowest": tally.slowest,
        "outcomes": {kind: dict(sorted(tally.outcomes[kind].items())) for kind in sorted(tally.outcomes)},
        "problems": tally.problems,
    }


def is_over(options: argparse.Namespace, tally: Any, started: float) -> bool:
    is_late = time.monotonic() - started > options.minutes * 60
    return is_late or bool(options.inputs and tally.num_inputs >= options.inputs)


def files_only(base: Path, options: argparse.Namespace, tally: Any) -> float:
    from fuzz_files import Files

    with Files(base, options.seed, tally) as files:
        files.turn()
        started = time.monotonic()
        while not is_over(options, tally, started):
            files.turn()
    return started


def at_all_doors(base: Path, doors: list[str], options: argparse.Namespace, tally: Any) -> float:
    """When it began (time.monotonic()): what starts processes does not count."""
    from fuzz_files import Files
    from fuzz_routes import Routes
    from fuzz_socket import Frames
    from fuzz_system import routes, served

    draw = random.Random(options.seed)

    async def run(worker: Any, config: Any) -> float:
        async with routes() as app:
            requests, frames = Routes(app, draw, tally), Frames(config.socket_path, draw, tally)
            await requests.canary(START_S)
            looked_at, reported_at, started = 0, 0, time.monotonic()
            while not is_over(options, tally, started):
                match draw.choice(doors):
                    case "routes":
                        for _ in range(20):
                            await requests.turn()
                    case "socket":
                        await asyncio.to_thread(frames.turn)
                    case _:
                        await asyncio.to_thread(files.turn)
                if tally.num_inputs - looked_at >= LOOK_EVERY:
                    looked_at = tally.num_inputs
                    await requests.canary()
                    for problem in worker.problems():
                        tally.problem(problem)
                if tally.num_inputs - reported_at >= 20 * LOOK_EVERY:
                    reported_at = tally.num_inputs
                    say(f"{tally.num_inputs} inputs, {tally.num_problems} problems")
            await requests.canary()
            for problem in worker.problems():
                tally.problem(problem)
            return started

    with Files(base, options.seed, tally) as files, served(base / "live") as (worker, config):
        return asyncio.run(run(worker, config))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("input", "outcomes", title=f"{figures['num_inputs']} inputs, seed {figures['seed']}")
    for kind, outcomes in figures["outcomes"].items():
        table.add_row(kind, ", ".join(f"{name}: {num}" for name, num in outcomes.items()))
    console = Console()
    console.print(table)
    console.print(
        f"{figures['minutes']:.1f} minutes, {figures['num_problems']} problems; the slowest answer took "
        f"{figures['slowest_answer_s']:.1f} s ({figures['slowest']})"
    )


if __name__ == "__main__":
    sys.exit(main())
