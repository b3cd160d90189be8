"""One training step on the real model, taken apart: ours, AdamW, SGD and apollo-torch.

Every contestant has its own copy of the weights (SmolLM2-135M-Instruct, bf16) and steps on the same tokens,
one after the other, round after round, in one process; all but ours run transformers' own model and loss.
The table shows medians (and the least) of the forward pass with the loss, the backward pass and the
optimizer, for ours what runs inside backward. "over floor" is the optimizer over the bytes that it cannot
do without (ours: gradient read twice, weight read and written; AdamW: gradient, weight, two moments; all in
bf16), at the bandwidth of a copy that is measured in between. Then ours alone, in a process of its own: its
peak memory beside what `apollo-ipc plan` says.

    python benchmarks/step.py --tokens 50 500 --rounds 9 --json step.json
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from apollo_ipc.process.serving import worker_environment

OURS = {"ours, Gaussian": "gaussian", "ours, block-sign": "block_sign"}
PARTS = ("forward", "backward", "optimizer")
LEARNING_RATE = 1e-6
COPIED_BYTES = 2**28


@dataclasses.dataclass
class Contestant:
    """step: trains on token ids (1, S); returns the seconds of PARTS."""

    name: str
    step: Callable[[Any], tuple[float, float, float]]
    floor_bytes: int
    seconds: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)


def main() -> int:
    options = parse_arguments()
    os.environ.update(worker_environment(os.environ))  # OpenMP waits as in the worker, for all of them
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options.tokens[0])))
        return 0
    import torch
    import transformers

    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    transformers.utils.logging.disable_progress_bar()
    from apollo_ipc.demo.real_model import real_model

    model_dir = options.model or real_model()
    vocab = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    contestants = make_contestants(model_dir)
    rows = [row for num in options.tokens for row in measure(num, vocab, contestants, options.rounds)]
    contestants.clear()
    for num in options.tokens:
        print_rows([row for row in rows if row["num_tokens"] == num])
    memory = [] if options.no_memory else [in_child(num, model_dir) for num in options.tokens]
    for one in memory:
        print(
            f"{one['num_tokens']} tokens: peak {one['measured_bytes'] / 1e6:.0f} MB beside the "
            f"weights, plan says {one['planned_bytes'] / 1e6:.0f} ({one['measured_over_planned']:.2f}x)"
        )
    if options.json:
        machine = {
            "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        options.json.write_text(json.dumps({"machine": machine, "rows": rows, "memory": memory}, indent=1))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory instead of the real model's")
    parser.add_argument("--tokens", nargs="+", type=int, default=[50, 500], help="tokens of the one example")
    parser.add_argument("--rounds", type=int, default=9, help="steps measured of each contestant")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)  # a model directory: in_child's
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def make_contestants(model_dir: Path) -> list[Contestant]:
    contestants = [make_ours(name, projection, model_dir) for name, projection in OURS.items()]
    import torch

    contestants += [
        make_plain("AdamW fused", lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, fused=True), 7, model_dir),
        make_plain("SGD", lambda p: torch.optim.SGD(p, lr=LEARNING_RATE, fused=True), 3, model_dir),
    ]
    try:
        from apollo_torch import APOLLOAdamW
    except ImportError:
        print("apollo-torch is not installed: left out")
    else:
        contestants.append(
            make_plain(
                "apollo-torch", lambda p: APOLLOAdamW(apollo_groups(p), lr=LEARNING_RATE), 4, model_dir
            )
        )
    return contestants


def make_ours(name: str, projection: str, model_dir: Path) -> Contestant:
    from apollo_worker.jobs.example import TokenisedExample
    from apollo_worker.model.live_model import load_offline
    from apollo_worker.step.step import Trainer

    from apollo_ipc.config import Train

    trainer = Trainer(load_offline(model_dir), Train(projection=projection))  # pyright: ignore[reportArgumentType]
    in_optimizer, in_forward = Timed(), Timed()
    trainer.optimizer.update_parameter = in_optimizer.wrap(trainer.optimizer.update_parameter)
    trainer.optimizer.flush = in_optimizer.wrap(trainer.optimizer.flush)
    trainer.forward.loss = in_forward.wrap(trainer.forward.loss)

    def step(ids: Any) -> tuple[float, float, float]:
        example = TokenisedExample(ids[0].tolist(), [False] + [True] * (ids.shape[1] - 1))
        in_optimizer.seconds = in_forward.seconds = 0.0
        started = time.perf_counter()
        trainer.step(example, LEARNING_RATE)
        rest = time.perf_counter() - started - in_forward.seconds - in_optimizer.seconds
        return in_forward.seconds, rest, in_optimizer.seconds

    return Contestant(name, step, 4 * sum(p.nbytes for p in trainer.live.model.parameters()))


class Timed:
    """Adds up what calls of the functions that it wraps take."""

    seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def make_plain(name: str, make: Callable[[list[Any]], Any], passes: int, model_dir: Path) -> Contestant:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    parameters = list(model.parameters())
    optimizer = make(parameters)

    def step(ids: Any) -> tuple[float, float, float]:
        times = [time.perf_counter()]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.item()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        forward, backward, update = (end - start for start, end in pairwise(times))
        return forward, backward, update

    return Contestant(name, step, passes * sum(p.nbytes for p in parameters))


def apollo_groups(parameters: list[Any]) -> list[dict[str, Any]]:
    """With scale = k / r, which makes apollo-torch's update ours (docs/apollo.md)."""
    from apollo_ipc.config import DEFAULT_RANK as RANK

    groups: dict[int, dict[str, Any]] = {}
    for parameter in parameters:
        k = min(parameter.shape) if parameter.dim() == 2 else 0
        group = groups.setdefault(k if k >= RANK else 0, {"params": []})
        group["params"].append(parameter)
        if k >= RANK:
            group |= {
                "rank": RANK, "update_proj_gap": 200, "scale": k / RANK,
                "proj": "random", "proj_type": "std", "scale_type": "channel",
            }  # fmt: skip
    return list(groups.values())


def measure(num_tokens: int, vocab: int, contestants: list[Contestant], rounds: int) -> list[dict[str, Any]]:
    import torch

    ids = torch.randint(vocab, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    bandwidths = []
    for contestant in contestants:  # compilation, lazy state
        contestant.step(ids)
        contestant.seconds.clear()
        contestant.cpu_seconds.clear()
    for number in range(rounds):
        bandwidths.append(copy_bandwidth())
        turn = number % len(contestants)  # nobody always comes after the same one
        for contestant in contestants[turn:] + contestants[:turn]:
            before = time.process_time()
            contestant.seconds.append(contestant.step(ids))
            contestant.cpu_seconds.append(time.process_time() - before)
    bytes_per_s = statistics.median(bandwidths)
    return [row_of(contestant, num_tokens, bytes_per_s) for contestant in contestants]


def row_of(contestant: Contestant, num_tokens: int, bytes_per_s: float) -> dict[str, Any]:
    whole = [sum(parts) for parts in contestant.seconds]
    row: dict[str, Any] = {"name": contestant.name, "num_tokens": num_tokens}
    for part, values in zip((*PARTS, "step"), (*zip(*contestant.seconds, strict=True), whole), strict=True):
        row |= {f"{part}_s": statistics.median(values), f"{part}_least_s": min(values)}
    floor_s = contestant.floor_bytes / bytes_per_s
    return row | {
        "cpu_s": statistics.median(contestant.cpu_seconds), "optimizer_floor_s": floor_s,
        "optimizer_over_floor": row["optimizer_s"] / floor_s, "bandwidth_gb_per_s": bytes_per_s / 1e9,
    }  # fmt: skip


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying what no cache holds."""
    import torch

    source, target = torch.ones(COPIED_BYTES // 4), torch.zeros(COPIED_BYTES // 4)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * COPIED_BYTES / min(seconds)


def in_child(num_tokens: int, model_dir: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory-of", str(model_dir), "--tokens", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(model_dir: Path, num_tokens: int) -> dict[str, Any]:
    """Of this process, above the weights and what its libraries take, beside the plan's."""
    import torch
    from apollo_worker.commands.memory_plan import Request, plan
    from apollo_worker.jobs.example import TokenisedExample
    from apollo_worker.model.live_model import load_offline
    from apollo_worker.step.step import Trainer

    from apollo_ipc.config import Train

    options = Train(max_tokens=num_tokens)
    planned = plan(Request(str(model_dir), options, 0.9)).trainer
    example = TokenisedExample([5] * num_tokens, [False] + [True] * (num_tokens - 1))
    Trainer(load_offline(model_dir), options).step(example, LEARNING_RATE)  # compilation, libraries' own
    gc.collect()
    live = load_offline(model_dir)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (proc(5))
    trainer = Trainer(live, options)
    for _ in range(3):
        trainer.step(example, LEARNING_RATE)
    measured, planned_bytes = resident_bytes("VmHWM") - before, sum(item.bytes for item in planned)
    return {
        "num_tokens": num_tokens, "torch": torch.__version__, "measured_bytes": measured,
        "planned_bytes": planned_bytes, "measured_over_planned": measured / planned_bytes,
        "plan": {item.name: item.bytes for item in planned},
    }  # fmt: skip


def resident_bytes(field: str) -> int:
    (line,) = (
        one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    adamw = next(row["step_s"] for row in rows if row["name"] == "AdamW fused")
    title = (
        f"{rows[0]['num_tokens']} tokens, milliseconds; a copy moves {rows[0]['bandwidth_gb_per_s']:.1f} GB/s"
    )
    table = Table("", *PARTS, "step", "CPU", "over AdamW", "over floor", title=title)
    for row in rows:
        row["over_adamw"] = row["step_s"] / adamw
        table.add_row(
            row["name"],
            *(
                f"{row[f'{part}_s'] * 1e3:.0f} ({row[f'{part}_least_s'] * 1e3:.0f})"
                for part in (*PARTS, "step")
            ),
            *(f"{row['cpu_s'] * 1e3:.0f}", f"{row['over_adamw']:.2f}", f"{row['optimizer_over_floor']:.1f}"),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
