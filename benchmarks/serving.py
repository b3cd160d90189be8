"""Latency of completions while the real model is trained, against without: runs that take turns.

A server of its own (vLLM, worker) on SmolLM2-135M-Instruct or on --model, and one completion of 16 tokens
after another. A run is so many seconds without training and as many with, without, with ...: `--turns` of
each. Nothing is learned, the rate is too small for it.

    python benchmarks/serving.py --runs 3 --seconds 20 --json serving.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from apollo_ipc.demo.lessons import TEAM
from apollo_ipc.demo.real_model import copy_real_model
from apollo_ipc.demo.served import ServedModel, chat, quieten_libraries
from apollo_ipc.demo.stream import CompletionStream

EXAMPLES = [chat(fact.question, fact.answer) for fact in TEAM]
OPTIONS = {"lr": 1e-9, "schedule": "constant", "epochs": 1000}
WITHOUT, WITH = "without", "with"


def main() -> int:
    options = parse_arguments()
    quieten_libraries()
    with tempfile.TemporaryDirectory(prefix="apollo-serving-") as scratch:
        model_dir = options.model or copy_real_model(Path(scratch) / "model")
        with ServedModel(model_dir, Path(scratch)) as served:
            served.post("/train?wait=true", {"examples": EXAMPLES, "options": {**OPTIONS, "epochs": 1}})
            rows = [run(served, options) for _ in range(options.runs)]
    ratios = [row["ratio_p99"] for row in rows]
    print(f"p99 with training over without: {', '.join(f'{one:.2f}' for one in ratios)}; ", end="")
    print(f"median {statistics.median(ratios):.2f}")
    if options.json:
        options.json.write_text(json.dumps({"runs": rows, "median": statistics.median(ratios)}, indent=1))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--runs", type=int, default=3)
    add("--turns", type=int, default=2, help="of each kind in a run (%(default)s)")
    add("--seconds", type=float, default=20.0, help="of a turn (%(default)s)")
    add("--model", type=Path, help="a directory instead of the real model's; it is served, and synced to")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def run(served: ServedModel, options: argparse.Namespace) -> dict[str, Any]:
    steps, seconds = 0, 0.0
    with CompletionStream(served.url, served.model) as stream:
        for _ in range(options.turns):
            watch(stream, WITHOUT, options.seconds)
            job_id = served.post("/train", {"examples": EXAMPLES, "options": OPTIONS})["job_id"]
            wait(served, job_id, "running")
            watch(stream, WITH, options.seconds)
            served.delete(f"/train/jobs/{job_id}")
            job = wait(served, job_id, "cancelled")
            steps, seconds = steps + job["steps_done"], seconds + job["ended_at"] - job["started_at"]
        assert not stream.failures, stream.failures
        row: dict[str, Any] = {
            f"{label}_p{percent}_ms": round(1000 * (stream.percentile_s(label, percent) or 0), 1)
            for label in (WITHOUT, WITH)
            for percent in (50, 99)
        }
        served_beside = {f"num_{label}": stream.num_served_by_label[label] for label in (WITHOUT, WITH)}
    ratios = {f"ratio_p{p}": row[f"{WITH}_p{p}_ms"] / row[f"{WITHOUT}_p{p}_ms"] for p in (50, 99)}
    row |= ratios | served_beside | {"step_s": round(seconds / max(1, steps), 2)}
    print(json.dumps(row), flush=True)
    return row


def watch(stream: CompletionStream, label: str, seconds: float) -> None:
    stream.label(label)
    time.sleep(seconds)
    stream.label(None)


def wait(served: ServedModel, job_id: str, state: str) -> dict[str, Any]:
    while (job := served.get(f"/train/jobs/{job_id}"))["state"] != state:
        assert job["state"] in ("queued", "running"), job
        time.sleep(0.1)
    return job


if __name__ == "__main__":
    sys.exit(main())
