"""Latency of completions while the real model is trained, against without: runs that take turns.

A server of its own (vLLM, worker) on SmolLM2-135M-Instruct or on --model, and one completion of 16 tokens
after another. A run is so many seconds without training and as many with, without, with ...: `--turns` of
each. Nothing is learned, the rate is too small for it. `--beside bodies`: instead of training, a client
sends one body of 31 MB after the other, whose last example is refused; its answer, and what another client
of the worker waits for its status, are timed too.

    python benchmarks/serving.py --runs 3 --seconds 20 --json serving.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

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
    print(f"p99 with {options.beside} over without: {', '.join(f'{one:.2f}' for one in ratios)}; ", end="")
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
    add("--beside", choices=("training", "bodies"), default="training")
    add("--model", type=Path, help="a directory instead of the real model's; it is served, and synced to")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def run(served: ServedModel, options: argparse.Namespace) -> dict[str, Any]:
    beside, found = {"training": training, "bodies": large_bodies}[options.beside], []
    with CompletionStream(served.url, served.model) as stream:
        for _ in range(options.turns):
            watch(stream, WITHOUT, options.seconds)
            with beside(served, found):
                watch(stream, WITH, options.seconds)
        assert not stream.failures, stream.failures
        row: dict[str, Any] = {
            f"{label}_p{percent}_ms": round(1000 * (stream.percentile_s(label, percent) or 0), 1)
            for label in (WITHOUT, WITH)
            for percent in (50, 99)
        }
        served_beside = {f"num_{label}": stream.num_served_by_label[label] for label in (WITHOUT, WITH)}
    ratios = {f"ratio_p{p}": row[f"{WITH}_p{p}_ms"] / row[f"{WITHOUT}_p{p}_ms"] for p in (50, 99)}
    totals = {
        name: round((max if name.startswith("slowest") else sum)(one[name] for one in found), 2)
        for name in found[0]
    }
    row |= ratios | served_beside | totals
    print(json.dumps(row), flush=True)
    return row


@contextmanager
def training(served: ServedModel, found: list[dict[str, float]]) -> Iterator[None]:
    job_id = served.post("/train", {"examples": EXAMPLES, "options": OPTIONS})["job_id"]
    wait(served, job_id, "running")
    yield
    served.delete(f"/train/jobs/{job_id}")
    job = wait(served, job_id, "cancelled")
    found.append({"steps": job["steps_done"], "training_s": job["ended_at"] - job["started_at"]})


@contextmanager
def large_bodies(served: ServedModel, found: list[dict[str, float]]) -> Iterator[None]:
    one = {"context_ids": [1], "continuation_ids": [5] * 1999}
    body = json.dumps({"training_data": {"samples": [*[one] * 5200, {"promt": "misspelt"}]}}).encode()
    is_over = threading.Event()

    def timed(ask: Callable[[httpx.Client], httpx.Response], status: int, pause_s: float) -> list[float]:
        times, headers = [], {"Authorization": f"Bearer {served.key}"}
        with httpx.Client(base_url=served.url, headers=headers, timeout=120) as client:
            while not is_over.wait(pause_s):
                started = time.perf_counter()
                assert ask(client).status_code == status
                times.append(time.perf_counter() - started)
        return times

    with ThreadPoolExecutor(2) as pool:
        sending = pool.submit(timed, lambda client: client.post("/train", content=body), 400, 0.0)
        asking = pool.submit(timed, lambda client: client.get("/train/status"), 200, 0.2)
        yield
        is_over.set()
    sent, asked = sending.result(), asking.result()
    figures = {"bodies": len(sent), "bodies_mb": len(sent) * len(body) / 1e6, "bodies_s": sum(sent)}
    found.append({**figures, "slowest_status_s": max(asked)})


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
