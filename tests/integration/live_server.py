"""A real vLLM server with a real worker, and ways of asking both."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from apollo_ipc.config import load_config
from apollo_ipc.keys import train_key
from apollo_ipc.manifest import Manifest, read_manifest
from apollo_ipc.process.serving import VllmServer, prompt_logprobs, worker_command, worker_environment

WAIT_S = 120.0


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """The condition's first true value. Fails the test, naming `what`, when none came in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {timeout_s:.0f} s")


class Live:
    """A vLLM server, its worker, and ways of asking both."""

    def __init__(self, model_dir: Path, base: Path, flags: list[str], env: dict[str, str] | None = None):
        self.base = base
        self.model_dir = model_dir
        self.server = VllmServer(model_dir, base, ["--enforce-eager", *flags], env=env)
        self.worker: subprocess.Popen | None = None
        # Not SCHED_IDLE: beside the other lane the worker would hardly get on.
        fair = {"APOLLO_WORKER__IDLE_PRIORITY": "false", "APOLLO_TRAIN__MAX_TOKENS": "512"}
        self.env = worker_environment({**self.server.env, **fair})

    @property
    def key(self) -> str:
        return train_key(load_config(environ=self.env))

    @property
    def manifest(self) -> Manifest:
        manifest = read_manifest(self.server.runtime_dir)
        assert manifest is not None
        return manifest

    def start_worker(self) -> None:
        with (self.base / "worker.log").open("ab") as log:
            self.worker = subprocess.Popen(worker_command(), env=self.env, stdout=log, stderr=log)

    def wait_attached(self) -> None:
        wait_for(lambda: self.get("/train/health").status_code == 200, f"attached\n{self.worker_log()}")

    def kill_worker(self) -> None:
        assert self.worker is not None
        self.worker.send_signal(signal.SIGKILL)
        self.worker.wait()

    def stop_worker(self) -> int:
        assert self.worker is not None
        self.worker.terminate()
        return self.worker.wait(90)

    def worker_log(self) -> str:
        path = self.base / "worker.log"
        return path.read_text()[-4000:] if path.exists() else ""

    def close(self) -> None:
        if self.worker is not None and self.worker.poll() is None:
            self.worker.kill()
            self.worker.wait()
        self.server.stop()
        if kept := os.environ.get("APOLLO_TEST_LOGS"):
            Path(kept).mkdir(parents=True, exist_ok=True)
            for log in self.base.glob("*.log"):
                shutil.copy(log, Path(kept) / f"{self.base.name}-{log.name}")

    def command(self, *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """`apollo-ipc ARGS`, as the user would type it."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("apollo-ipc")), *args],
            env=self.env, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    # --- HTTP ---

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.server.url + path, headers=self.headers, timeout=60)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.server.url + path, json=body, headers={**self.headers, **headers}, timeout=600)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def train(self, examples: list[dict], **options: Any) -> dict:
        """Trains and waits; the finished job."""
        response = self.post("/train?wait=true", {"examples": examples, "options": options})
        assert response.status_code == 200, response.text
        return response.json()

    def job(self, job_id: str) -> dict:
        """As GET shows it; empty values while the worker cannot be asked."""
        response = self.get(f"/train/jobs/{job_id}")
        return response.json() if response.status_code == 200 else {"state": "", "steps_done": 0}

    def status(self) -> dict:
        return self.get("/train/status").json()

    def ask(self, question: str, max_tokens: int = 32) -> str:
        body = {
            "model": self.server.model_name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        return self.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]

    def logprobs(self, ids: list[int]) -> list[float]:
        return prompt_logprobs(self.server.url, self.server.model_name, ids)


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def read_live_weights(runtime_dir: Path) -> dict[str, torch.Tensor]:
    """What a fresh process that knows only the manifests reads; of several ranks that the replicas agree."""
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from apollo_ipc.manifest import read_ranks\n"
        "from apollo_worker.model.live_tensor import agrees, whole\n"
        "from apollo_worker.model.mapping import map_views, open_transport\n"
        "from apollo_worker.model.pieces import map_pieces\n"
        "from safetensors.torch import save_file\n"
        "ranks = read_ranks(Path(sys.argv[1]))\n"
        "memory = [open_transport(one) for one in ranks]\n"
        "live = map_views(ranks[0], memory[0]) if len(ranks) == 1 else map_pieces(ranks, memory)\n"
        "assert all(agrees(tensor, whole(tensor)) for tensor in live.values())\n"
        "save_file({n: whole(t).contiguous().clone() for n, t in live.items()}, sys.argv[2])\n"
    )
    out = runtime_dir / "live.safetensors"
    subprocess.run([sys.executable, "-c", code, str(runtime_dir), str(out)], check=True)
    tensors = load_file(out)
    out.unlink()
    return tensors


def start_live(model_dir: Path, base: Path, *flags: str, env: dict[str, str] | None = None) -> Live:
    live = Live(model_dir, base, list(flags), env)
    try:
        live.server.start()
        live.start_worker()
        live.server.wait_until_ready()
        live.wait_attached()
    except BaseException:
        print(live.server.log_tail(40), live.worker_log())
        live.close()
        raise
    return live


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
