"""Memory of each loss over many targets, beside plain cross entropy on whole logits: a process each.

    python benchmarks/loss_memory.py [--targets 512] [--hidden 64] [--json FILE]

What is counted: the most that forward and backward hold above what is there before them (VmHWM, reset through
/proc/self/clear_refs), gradients of head and hidden states in it. A small hidden size shows the logits' part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from apollo_worker.jobs.objective import Objective
from apollo_worker.step.loss import target_loss, teacher_of
from apollo_worker.step.objectives import Policy

VOCABULARIES = (49_152, 248_320)
WAYS = ("plain", "cross_entropy", "soft targets", "importance_sampling", "ppo with kl_to_reference")
NUM_TOP = 20


def main(argv: list[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.one:
        print(peak_of(loss_of(args.one[0], int(args.one[1]), args.targets, args.hidden)))
        return
    figures: dict[str, dict[int, int]] = {}
    for way in WAYS:
        figures[way] = {vocabulary: in_a_process(args, way, vocabulary) for vocabulary in VOCABULARIES}
        print(
            f"{way:28}" + "".join(f"{peak / 2**20:10.0f} MiB" for peak in figures[way].values()), flush=True
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def in_a_process(args: argparse.Namespace, way: str, vocabulary: int) -> int:
    flags = ["--targets", str(args.targets), "--hidden", str(args.hidden)]
    command = [sys.executable, __file__, "--one", way, str(vocabulary), *flags]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loss_of(way: str, vocabulary: int, num_targets: int, hidden_size: int) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, hidden_size, generator=generator).bfloat16().requires_grad_()
        for rows in (num_targets, vocabulary)
    )
    targets = torch.randint(vocabulary, (num_targets,), generator=generator)
    if way == "plain":
        return lambda: torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets)
    ones = torch.ones(num_targets)
    given: dict = {
        "cross_entropy": {},
        "soft targets": {"teacher": teacher_of(targets, [[(i, -4.0) for i in range(NUM_TOP)]] * num_targets)},
        "importance_sampling": {"policy": Policy(Objective("importance_sampling"), -ones, ones, None)},
        "ppo with kl_to_reference": {
            "policy": Policy(Objective("ppo", kl_to_reference=0.1), -ones, ones, -ones)
        },
    }[way]
    return lambda: target_loss(hidden, weight, None, targets, **given)


def peak_of(loss: Callable[[], torch.Tensor]) -> int:
    """Bytes."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loss().backward()
    return status("VmHWM") - before


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    main()
