"""One optimizer step: ours against apollo-torch, AdamW (fused, foreach) and SGD, beside its byte floor.

Every contestant has its own copy of the weight and the same gradients. They step in turns, round after round,
in one process; the table shows the median and the quartiles. The floor is what the step cannot do without
(gradient read twice, weight read and written; AdamW: gradient, weight, two moments) over the bandwidth that
is measured in between.

    python benchmarks/optimizer.py --shapes 2048x2048 --ranks 64 --dtypes bfloat16 --json optimizer.json
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apollo_ipc.process.serving import worker_environment

SHAPES = ("2048x2048", "1024x4096", "4096x1024", "5120x17408")
RANKS = (1, 16, 64, 256)
DTYPES = ("float32", "bfloat16")
BANDWIDTH_BYTES = 2**28


@dataclasses.dataclass
class Contestant:
    optimizer: str
    rank: int | None
    projection: str | None
    step: Callable[[Any], None]  # takes the gradient
    floor_bytes: int
    state_bytes: Callable[[], int]
    seconds: list[float] = dataclasses.field(default_factory=list)


def main() -> int:
    options = parse_arguments()
    os.environ.update(
        worker_environment(os.environ)
    )  # OpenMP waits as it does in the worker, for all of them
    import torch

    torch.set_num_threads(options.threads or torch.get_num_threads())
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for shape in options.shapes:
            rows += measure(shape, getattr(torch, dtype), options)
            print_rows(
                rows[-1:]
                if options.quiet
                else [r for r in rows if r["shape"] == shape and r["dtype"] == dtype]
            )
    verdicts = judge(rows)
    for line in verdicts:
        print(line)
    if options.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
        if options.device == "cuda":
            machine["gpu"] = torch.cuda.get_device_name()
        machine |= {"torch": torch.__version__, "python": platform.python_version()}
        options.json.write_text(
            json.dumps({"machine": machine, "rows": rows, "verdicts": verdicts}, indent=1)
        )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLS")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=9, help="steps measured of each contestant")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quiet", action="store_true", help="print the verdicts only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def measure(shape_name: str, dtype: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    shape = tuple(int(n) for n in shape_name.split("x"))
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(options.device, dtype) for _ in range(2)]
    contestants = make_contestants(shape, dtype, options)
    clock = Clock(options.device)
    for contestant in contestants:  # compilation, lazy state
        for grad in grads:
            contestant.step(grad)
    bandwidths = []
    for number in range(options.rounds):
        bandwidths.append(bandwidth(clock, options.device))
        for contestant in contestants:
            contestant.seconds.append(clock.time(lambda c=contestant, grad=grads[number % 2]: c.step(grad)))
    bytes_per_s = statistics.median(bandwidths)
    rows = []
    for contestant in contestants:
        low, median, high = (q * 1e3 for q in statistics.quantiles(contestant.seconds, n=4))
        floor_ms = contestant.floor_bytes / bytes_per_s * 1e3
        rows.append(
            {
                "optimizer": contestant.optimizer,
                "shape": shape_name, "dtype": str(dtype).removeprefix("torch."),
                "rank": contestant.rank, "projection": contestant.projection, "median_ms": median,
                "quartiles_ms": [low, high], "floor_ms": floor_ms, "over_floor": median / floor_ms,
                "state_bytes": contestant.state_bytes(), "bandwidth_gb_per_s": bytes_per_s / 1e9,
                "device": options.device,
            }
        )  # fmt: skip
    del contestants
    gc.collect()
    return rows


def make_contestants(shape: tuple[int, ...], dtype: Any, options: argparse.Namespace) -> list[Contestant]:
    import torch
    from apollo_torch import APOLLOAdamW
    from apollo_worker.optimizer.apollo import Apollo

    def weight() -> Any:
        generator = torch.Generator().manual_seed(1)
        return torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(options.device, dtype))

    def torchs(name: str, make: Callable[[Any], Any], passes: int, rank: int | None = None) -> Contestant:
        param = weight()
        optimizer = make(param)

        def step(grad: Any) -> None:
            param.grad = grad
            optimizer.step()
            param.grad = None

        def state_bytes() -> int:
            state = optimizer.state[param]
            kept = [*state.values(), *(vars(p) for p in state.values() if hasattr(p, "ortho_matrix"))]
            tensors = [t for t in kept if isinstance(t, torch.Tensor)]
            tensors += [p["ortho_matrix"] for p in kept if isinstance(p, dict)]
            return sum(t.nbytes for t in tensors)

        return Contestant(name, rank, "gaussian" if rank else None, step, passes * param.nbytes, state_bytes)

    def ours(rank: int, projection: str) -> Contestant:
        param = weight()
        optimizer = Apollo([("layer.weight", param)], lr=1e-5, rank=rank, projection=projection)

        def step(grad: Any) -> None:
            param.grad = grad
            optimizer.step()

        return Contestant("apollo-ipc", rank, projection, step, 4 * param.nbytes, optimizer.state_size_bytes)

    def apollo_torch(param: Any, rank: int) -> Any:
        group = {
            "params": [param], "rank": rank, "update_proj_gap": 10**6, "scale": min(shape) / rank,
            "proj": "random", "proj_type": "std", "scale_type": "tensor" if rank == 1 else "channel",
        }  # fmt: skip
        return APOLLOAdamW([group], lr=1e-5)

    contestants = [
        torchs("AdamW fused", lambda p: torch.optim.AdamW([p], lr=1e-5, fused=True), 7),
        torchs("AdamW foreach", lambda p: torch.optim.AdamW([p], lr=1e-5, foreach=True), 7),
        torchs("SGD", lambda p: torch.optim.SGD([p], lr=1e-5), 3),
    ]
    for rank in options.ranks:
        contestants += [
            ours(rank, "gaussian"),
            ours(rank, "block_sign"),
            torchs("apollo-torch", lambda p, rank=rank: apollo_torch(p, rank), 4, rank),
        ]
    return contestants


class Clock:
    def __init__(self, device: str):
        self._is_cuda = device == "cuda"

    def time(self, work: Callable[[], None]) -> float:
        """Seconds until `work` is done, on the device too."""
        if not self._is_cuda:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        import torch

        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def bandwidth(clock: Clock, device: str) -> float:
    """Bytes a second of `a += b` on tensors beyond every cache: two reads and a write."""
    import torch

    num = BANDWIDTH_BYTES // 4 * (8 if device == "cuda" else 1)
    a, b = torch.zeros(num, device=device), torch.ones(num, device=device)
    a.add_(b)
    return 3 * a.nbytes / min(clock.time(lambda: a.add_(b)) for _ in range(3))


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """Ours over the others, of each shape and dtype, as ratios of medians."""
    lines = []
    for row in rows:
        if row["optimizer"] != "apollo-ipc":
            continue
        same = [r for r in rows if (r["shape"], r["dtype"]) == (row["shape"], row["dtype"])]
        theirs = next(r for r in same if r["optimizer"] == "apollo-torch" and r["rank"] == row["rank"])
        adamw = next(r for r in same if r["optimizer"] == "AdamW fused")
        row["times_faster_than_apollo_torch"] = theirs["median_ms"] / row["median_ms"]
        row["over_adamw_fused"] = row["median_ms"] / adamw["median_ms"]
        lines.append(
            f"{row['dtype']} {row['shape']} rank {row['rank']} {row['projection']}: "
            f"{row['times_faster_than_apollo_torch']:.1f} times faster than apollo-torch, "
            f"{row['over_adamw_fused']:.2f} times AdamW fused, {row['over_floor']:.1f} times its floor"
        )
    return lines


def print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    title = f"{rows[0]['shape']} {rows[0]['dtype']}, {rows[0]['bandwidth_gb_per_s']:.1f} GB/s"
    table = Table(
        "optimizer", "rank", "projection", "median ms", "quartiles", "over floor", "state MB", title=title
    )
    for row in rows:
        low, high = row["quartiles_ms"]
        table.add_row(
            *(row["optimizer"], str(row["rank"] or ""), row["projection"] or "", f"{row['median_ms']:.2f}"),
            *(f"{low:.2f} {high:.2f}", f"{row['over_floor']:.1f}", f"{row['state_bytes'] / 1e6:.2f}"),
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
