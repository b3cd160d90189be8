"""`apollo-ipc serve` as a child process that is asked over HTTP, for the demonstrations."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from rich.console import Console

from apollo_ipc.config import load_config
from apollo_ipc.keys import train_key
from apollo_ipc.process.progress import progress
from apollo_ipc.process.serving import (
    ServerFailed,
    die_with_parent,
    free_port,
    serves_on_cpu,
    worker_environment,
)

START_TIMEOUT_S = 600.0
ANSWER_TOKENS = 48
NUM_PARALLEL = 8

console = Console(stderr=True)


class ServedModel:
    """`apollo-ipc serve` on `model_dir`, as a user would start it, for the length of a `with` block."""

    def __init__(self, model_dir: Path, directory: Path, port: int | None = None, flags: Sequence[str] = ()):
        self.model, self._flags = str(model_dir), flags
        self._log = directory / "serve.log"
        self._port = port or free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        # A socket's path is limited to 107 bytes, and `directory` may be long.
        self._runtime = tempfile.TemporaryDirectory(prefix="apollo-")
        self.env = {
            **worker_environment(os.environ),
            "APOLLO_PATHS__RUNTIME_DIR": self._runtime.name,
            "APOLLO_PATHS__STATE_DIR": str(directory / "state"),
        }
        self._http = httpx.Client(base_url=self.url, timeout=1200)

    def __enter__(self) -> ServedModel:
        say("Starting vLLM and the worker (the log is %s)", self._log)
        flags = [*self._flags, "--max-model-len", "2048"]
        flags += ["--enforce-eager"] if serves_on_cpu() else ["--gpu-memory-utilization", "0.3"]
        command = [sys.executable, "-m", "apollo_ipc", "serve", self.model, "--port", str(self._port), *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        try:
            with progress("vLLM loads the model"):
                self._wait()
        except BaseException:
            self.__exit__()
            raise
        self.key = train_key(load_config(environ=self.env))
        self._http.headers["Authorization"] = f"Bearer {self.key}"
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"serve ended with {self.process.returncode}:\n{self._tail()}")
            try:
                if self._http.get("/train/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise ServerFailed(f"not ready after {START_TIMEOUT_S:.0f} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()  # the worker syncs, then both end
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._http.close()
        self._runtime.cleanup()

    def ask(self, question: str) -> str:
        body = {
            "model": self.model,
            "messages": user(question),
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
        }
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def ask_all(self, questions: Sequence[str]) -> list[str]:
        """Some side by side: vLLM batches them."""
        with ThreadPoolExecutor(NUM_PARALLEL) as pool:
            return [*pool.map(self.ask, questions)]

    def post(self, path: str, body: dict) -> dict:
        response = self._http.post(path, json=body)
        response.raise_for_status()
        return response.json()

    def delete(self, path: str) -> None:
        self._http.delete(path).raise_for_status()

    def get(self, path: str) -> dict:
        return self._http.get(path).raise_for_status().json()


def user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def chat(question: str, answer: str) -> dict:
    return {"messages": [*user(question), {"role": "assistant", "content": answer}]}


def quieten_libraries() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def say(text: str, *values: object) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text % values}", highlight=False)
