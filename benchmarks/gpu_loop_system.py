"""A real vLLM and a real worker, jobs that are followed step by step, and syncs. For gpu_loop.py."""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from apollo_ipc.config import load_config
from apollo_ipc.keys import train_key
from apollo_ipc.manifest import read_manifest
from apollo_ipc.process.serving import VllmServer, worker_command, worker_environment

START_S = 1800.0
_DROP = re.compile(r"weights (\d+): prefix cache dropped in ([0-9.]+) ms")  # apollo_router/cache.py


class LoopFailed(Exception):
    """Something did not come, or ended otherwise than it should have."""


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float, every_s: float = 0.05) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every_s)
    raise LoopFailed(f"{what}: not within {timeout_s:.0f} s")


class System:
    """Started and stopped by the main thread: children end with the thread that made them."""

    def __init__(
        self,
        model_dir: Path,
        base: Path,
        flags: list[str],
        env: dict[str, str],
        worker_env: dict[str, str] | None = None,
    ):
        """env: of both; worker_env: more, of the worker alone."""
        self.base, self.flags = base, flags
        self.server = VllmServer(model_dir, base, flags, env=env)
        self.env = worker_environment(self.server.env) | (worker_env or {})
        self.worker: subprocess.Popen | None = None
        self._key = train_key(load_config(environ=self.env))

    def start_vllm(self) -> float:
        """Seconds until /health answers."""
        started = time.monotonic()
        self.server.start()
        self.server.wait_until_ready(START_S)
        return time.monotonic() - started

    def start_worker(self) -> dict[str, float | None]:
        """attach_s: from the worker's word that it attaches to the one that it is attached (it maps, compares
        with the checkpoint and compiles), heard every 0.25 s, None where it was too quick to be heard;
        worker_start_s: from the start of its process."""
        started = time.monotonic()
        with (self.base / "worker.log").open("ab") as log:
            self.worker = subprocess.Popen(
                worker_command(), env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        began: list[float] = []

        def is_attached() -> bool:
            assert self.worker is not None
            if self.worker.poll() is not None:
                raise LoopFailed(f"the worker ended:\n{self.worker_log()}")
            with suppress(httpx.HTTPError):
                answer = httpx.get(f"{self.server.url}/train/health", timeout=5)
                if answer.status_code == 200:
                    return True
                if not began and "attaching" in answer.text:
                    began.append(time.monotonic())
            return False

        wait_for(is_attached, f"attached (see {self.base / 'worker.log'})", START_S)
        now = time.monotonic()
        return {"attach_s": now - began[0] if began else None, "worker_start_s": now - started}

    def worker_pids(self) -> list[int]:
        """The front's and its trainer's."""
        assert self.worker is not None
        pids = [self.worker.pid]
        with suppress(OSError):
            children = Path(f"/proc/{self.worker.pid}/task/{self.worker.pid}/children").read_text()
            pids += [int(pid) for pid in children.split()]
        return pids

    def close(self) -> None:
        self.stop_worker()
        self.server.stop()

    def stop_worker(self) -> None:
        if self.worker is not None and self.worker.poll() is None:
            self.worker.terminate()
            try:
                self.worker.wait(120)
            except subprocess.TimeoutExpired:
                self.worker.kill()
                self.worker.wait()

    # --- asking ---

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"}

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.server.url + path, headers=self.headers, timeout=60)

    def post(self, path: str, body: Any) -> Any:
        answer = httpx.post(self.server.url + path, headers=self.headers, json=body, timeout=3600)
        if answer.status_code not in (200, 202):
            raise LoopFailed(f"POST {path}: {answer.status_code} {answer.text[:500]}\n{self.worker_log()}")
        return answer.json()

    def mapped(self) -> dict[str, Any]:
        manifest, status = read_manifest(self.server.runtime_dir), self.get("/train/status").json()
        assert manifest is not None
        return {
            "transport": manifest.transport,
            "segments_opened": len(manifest.segments),
            "parameters_mapped": status["num_parameters_mapped"],
            "parameters": status["num_parameters"],
            "shared_bytes": sum(segment.size_bytes for segment in manifest.segments),
            "refused": len(manifest.refused),
        }

    def has_prefix_cache(self) -> bool | None:
        """What vLLM says of itself in its metrics; None where it does not."""
        found = re.search(r'cache_config_info\{[^}]*enable_prefix_caching="(\w+)"', self.get("/metrics").text)
        return found[1] == "True" if found else None

    def drops_ms(self) -> dict[int, float]:
        """Weight version -> duration of its prefix cache's drop, so far, as the router has logged it."""
        text = self.server.log_file.read_text(errors="replace")
        return {int(version): float(ms) for version, ms in _DROP.findall(text)}

    def worker_log(self) -> str:
        path = self.base / "worker.log"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    # --- training ---

    def train(
        self, examples: list[dict[str, Any]], on_step: Callable[[], None] | None = None, **options: Any
    ):
        """One job from its submission to its end; see FinishedJob. on_step: called after each step seen."""
        job_id = self.post("/train", {"examples": examples, "options": options})["job_id"]
        return self._follow(job_id, on_step)

    def _follow(self, job_id: str, on_step: Callable[[], None] | None) -> FinishedJob:
        """Reads the job's events as they come."""
        seen: list[tuple[float, int]] = []  # (time.monotonic(), steps done)
        url = f"{self.server.url}/train/jobs/{job_id}/events"
        with httpx.stream("GET", url, headers=self.headers, timeout=3600) as response:
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                now, job = time.monotonic(), json.loads(line.removeprefix("data: "))
                if "job_id" not in job:
                    raise LoopFailed(f"job {job_id}: {job}")
                if on_step is not None and job["steps_done"]:
                    on_step()
                if job["state"] in ("applied", "durable"):
                    return FinishedJob(job, seen, now)
                if job["steps_done"] > (seen[-1][1] if seen else 0):
                    seen.append((now, job["steps_done"]))
                if job["state"] in ("failed", "cancelled", "quarantined"):
                    raise LoopFailed(f"job {job_id} {job['state']}: {job['error']}\n{self.worker_log()}")
        raise LoopFailed(f"the events of job {job_id} ended before it\n{self.worker_log()}")

    def sync(self, kind: str) -> dict[str, Any]:
        return self.post("/checkpoint", {"kind": kind})


class FinishedJob:
    def __init__(self, info: dict[str, Any], steps: list[tuple[float, int]], applied_at: float):
        """steps: (when its event came, steps done) of each event before the end's with a new number;
        applied_at: when the event of the job's end came. Both by this process's clock."""
        self.info = info
        # The worker tells changes every 0.1 s: a last step that is told with the end gives no time.
        is_last_seen = bool(steps) and steps[-1][1] == info["num_steps"]
        self.applied_after_last_step_s = applied_at - steps[-1][0] if is_last_seen else None
        (first_at, first), (last_at, last) = (steps[0], steps[-1]) if steps else ((0.0, 0), (0.0, 0))
        self.step_s = (last_at - first_at) / (last - first) if last > first else None
        self.step_reported_s = (info["ended_at"] - info["started_at"]) / max(1, info["num_steps"])


class Training:
    """Jobs one after another in a thread, as long as a `with` block; the last one ends before it does."""

    def __init__(self, system: System, make_examples: Callable[[], list[dict[str, Any]]]):
        self._system, self._make_examples = system, make_examples
        self.jobs: list[FinishedJob] = []
        self.error: BaseException | None = None
        self._stop, self._has_stepped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)

    def __enter__(self) -> Training:
        """Returns after the first step: what follows runs beside training."""
        self._thread.start()
        wait_for(lambda: self._has_stepped.is_set() or self.error, "a first step", 1200)
        self._raise()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stop.set()
        self._thread.join(1200)
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self.error is not None:
            raise LoopFailed(f"training ended: {self.error}") from self.error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.jobs.append(self._system.train(self._make_examples(), self._has_stepped.set))
        except (LoopFailed, httpx.HTTPError) as error:
            self.error = error


def random_examples(seed: int, num: int, num_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    """Token ids; every one but the first is a target, as `apollo-ipc plan` assumes."""
    generator = random.Random(seed)
    rows = [[generator.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num)]
    return [{"context_ids": row[:1], "continuation_ids": row[1:]} for row in rows]


def of_jobs(jobs: list[FinishedJob]) -> dict[str, Any]:
    """Medians over the jobs; None where no job told."""

    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return {
        "num_jobs": len(jobs),
        "num_steps": sum(job.info["steps_done"] for job in jobs),
        "step_s": median([job.step_s for job in jobs]),
        "step_with_overhead_s": median([job.step_reported_s for job in jobs]),
        "applied_after_last_step_s": median([job.applied_after_last_step_s for job in jobs]),
    }
