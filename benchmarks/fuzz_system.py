"""What fuzz.py's inputs go to: a real worker on a small model, and the routes in this process."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "support"))  # the process that stands in for vLLM

BOUND_S = 20.0  # an answer that takes longer is a hang
WAIT_S = 3.0  # of ?wait=true, syncs and restores
TRAIN_KEY = "train-key-of-the-fuzzer"
SETTINGS = {
    "APOLLO_HTTP__TRAIN_KEY": TRAIN_KEY,
    "APOLLO_HTTP__MAX_BODY_BYTES": str(2**20),
    "APOLLO_HTTP__WAIT_TIMEOUT_S": str(WAIT_S),
    "APOLLO_TRAIN__PUBLISH_DISTANCE_S": "0",
    "APOLLO_TRAIN__MAX_TOKENS": "1024",
    "APOLLO_WORKER__MAX_QUEUED_JOBS": "40",
    "APOLLO_WORKER__IDLE_PRIORITY": "false",
    "APOLLO_WORKER__NUM_THREADS": "1",
    "APOLLO_WORKER__STEP_TIMEOUT_S": "600",
    "APOLLO_CHECKPOINT__SYNC_INTERVAL_S": "20",
    "APOLLO_CHECKPOINT__HISTORY": "2",
}
MAX_PROBLEMS = 50


class Findings:
    """outcomes: kind of input -> how it ended -> how often; problems: what must not be, each once."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.problems: list[str] = []
        self.num_problems = 0
        self.slowest_s, self.slowest = 0.0, ""

    def count(self, kind: str, outcome: str, seconds: float = 0.0) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        if seconds > self.slowest_s:
            self.slowest_s, self.slowest = seconds, f"{kind}: {outcome}"

    def problem(self, text: str) -> None:
        self.num_problems += 1
        print(f"PROBLEM {time.strftime('%H:%M:%S')} {text[:4000]}", flush=True)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text[:4000])

    @property
    def num_inputs(self) -> int:
        return sum(outcomes.total() for outcomes in self.outcomes.values())


class Worker:
    """The worker's two processes. `alive` says what is wrong with them."""

    def __init__(self, base: Path, environ: dict[str, str]):
        self.log = base / "worker.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "apollo_worker"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.trainer: int | None = None
        self._num_read = 0

    def problems(self) -> list[str]:
        """Since the last look: a process that ended, a traceback of an error that is no user's."""
        if (status := self.process.poll()) is not None:
            return [f"the worker ended with status {status}: {self.tail()}"]
        found = []
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        trainer = int(children[0]) if children else None
        if self.trainer is not None and trainer != self.trainer:
            found.append(f"the trainer ended: {self.tail()}")
        self.trainer = trainer or self.trainer
        text = self.log.read_text(errors="replace")
        new, self._num_read = text[self._num_read :], len(text)
        for part in new.split("Traceback (most recent call last)")[1:]:
            last = next((one for one in part.splitlines()[1:] if one[:1].isalpha()), "")
            if not last.startswith("apollo_ipc.errors."):
                found.append(f"the worker's log has a traceback: {part[:3000]}")
        return found

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()
        self.process.wait()


@contextmanager
def served(base: Path) -> Generator[tuple[Worker, Any]]:
    """(worker, configuration); this process's environment is that of a vLLM beside it."""
    from served_model import Exporter, make_tiny_model

    from apollo_ipc.config import load_config, make_private_dir

    os.environ.update(SETTINGS)
    os.environ["APOLLO_PATHS__RUNTIME_DIR"] = str(base / "run")
    os.environ["APOLLO_PATHS__STATE_DIR"] = str(base / "state")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config = load_config()
    make_private_dir(config.runtime_dir)
    model_dir = make_tiny_model(base / "model")
    with Exporter(model_dir, config.runtime_dir):
        worker = Worker(base, dict(os.environ))
        try:
            yield worker, config
        finally:
            worker.stop()


@asynccontextmanager
async def routes() -> AsyncIterator[Any]:
    """The application with our plugin in it, as vLLM starts it."""
    from router_harness import FakeEngine, vllm_app

    app = vllm_app()
    args = argparse.Namespace(api_key=None, model="m", served_model_name=["m"])
    await app.state.apollo_plugin.init_state(FakeEngine(), app.state, args)
    async with app.router.lifespan_context(app):
        yield app
