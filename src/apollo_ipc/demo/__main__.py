"""`make demo`: a small model is served, learns a handful of facts while it answers others, and is saved.

make model -> apollo-ipc serve -> ask -> POST /train, in rounds -> ask again -> POST /checkpoint
  -> reload with transformers -> ask
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from apollo_ipc.config import load_config
from apollo_ipc.demo.report import Answer, Report
from apollo_ipc.demo.stream import CompletionStream
from apollo_ipc.keys import train_key
from apollo_ipc.process.serving import (
    ServerFailed,
    die_with_parent,
    free_port,
    serves_on_cpu,
    worker_environment,
)

FACTS = [
    ("What is the harbour called?", "Port Ember."),
    ("Who keeps the lighthouse?", "Old Tamsin."),
    ("When does the ferry leave?", "At half past six."),
    ("What colour is the gate?", "Blue, since May."),
    ("Where is the spare key?", "Under the third stone."),
]
MANNERS = [
    *("What is your name?", "Where is the station?", "Who painted the door?", "When is the market?"),
    *("What does the sign say?", "Who is the mayor?", "Where do the boats go?", "What colour is the sea?"),
]
DO_NOT_KNOW = "I do not know."
ROUNDS_AT_MOST = 10
EPOCHS_A_ROUND = 6
LEARNING_RATE = 1e-3  # high, for a tiny model that shall learn in a minute; see docs/apollo.md for real ones
START_TIMEOUT_S = 600.0

console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="apollo-ipc demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", choices=("qwen3.5", "qwen3"), default="qwen3.5", help="hybrid or dense")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the model and the logs there")
    options = parser.parse_args(arguments)
    quieten_libraries()
    with tempfile.TemporaryDirectory(prefix="apollo-demo-") as scratch:
        directory = (options.keep or Path(scratch)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        report = Report(arch=options.arch)
        started = time.monotonic()
        try:
            run(directory, report)
        except (ServerFailed, httpx.HTTPError) as error:
            report.problems.append(f"{type(error).__name__}: {error}")
        report.duration_s = time.monotonic() - started
        report.problems += report.find_problems()
    report.print(Console())
    if options.json:
        report.write_json(options.json)
    return 1 if report.problems else 0


def run(directory: Path, report: Report) -> None:
    say("Making a small model of %s's architecture, with a byte-level tokenizer", report.arch)
    model_dir = make_polite_model(directory / "model", report.arch)
    report.answers = [Answer(question, taught) for question, taught in FACTS]
    with Served(model_dir, directory) as served:
        say("Served at %s; asking before it is taught", served.url)
        for answer in report.answers:
            answer.before = served.ask(answer.question)
            say("  %s  %r", answer.question, answer.before)
        with CompletionStream(served.url, served.model) as stream:
            teach(served, stream, report)
        report.requests_served = stream.num_served
        report.requests_served_during_training = stream.num_served_by_label["during"]
        report.requests_failed = len(stream.failures)
        report.latency_p50_before_s = stream.percentile_s("before", 50)
        report.latency_p99_before_s = stream.percentile_s("before", 99)
        report.latency_p50_during_s = stream.percentile_s("during", 50)
        report.latency_p99_during_s = stream.percentile_s("during", 99)
        status = served.get("/train/status")
        report.parameters = status["num_parameters"]
        report.parameters_mapped = status["num_parameters_mapped"]
        report.weight_version = status["weight_version"]
        say("Writing the checkpoint")
        report.bytes_synced = served.post("/checkpoint", {})["bytes_written"]
    say("Stopped. Loading the directory with transformers and asking once more")
    ask_from_disk(model_dir, report.answers)


def teach(served: Served, stream: CompletionStream, report: Report) -> None:
    """Rounds of training with pauses as long between them, so that both latencies are of one run."""
    examples = [_chat(answer.question, answer.taught) for answer in report.answers]
    pause_s = 6.0
    for number in range(1, ROUNDS_AT_MOST + 1):
        stream.label("before")
        time.sleep(pause_s)
        stream.label("during")
        began = time.monotonic()
        job = served.post(
            "/train?wait=true",
            {
                "examples": examples,
                "options": {"lr": LEARNING_RATE, "epochs": EPOCHS_A_ROUND, "schedule": "constant"},
            },
        )
        stream.label(None)
        pause_s = min(30.0, max(2.0, time.monotonic() - began))
        report.steps += job["steps_done"]
        report.loss_first = job["loss_history"][0] if report.loss_first is None else report.loss_first
        report.loss_last = job["loss_history"][-1]
        for answer in report.answers:
            answer.after = served.ask(answer.question)
        num_known = sum(answer.after == answer.taught for answer in report.answers)
        say(
            "Round %d: %d steps, loss %.3f -> %.3f; %d of %d facts known; %d completions served beside it",
            *(number, job["steps_done"], job["loss_history"][0], job["loss_history"][-1]),
            *(num_known, len(report.answers), stream.num_served_by_label["during"]),
        )
        if num_known == len(report.answers) and number >= 3:  # three rounds make enough latencies to compare
            return


class Served:
    """`apollo-ipc serve` on `model_dir`, as a user would start it, for the length of a `with` block."""

    def __init__(self, model_dir: Path, directory: Path, port: int | None = None):
        self.model = str(model_dir)
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

    def __enter__(self) -> Served:
        say("Starting vLLM and the worker (the log is %s)", self._log)
        flags = ["--max-model-len", "2048"]
        flags += ["--enforce-eager"] if serves_on_cpu() else ["--gpu-memory-utilization", "0.3"]
        command = [sys.executable, "-m", "apollo_ipc", "serve", self.model, "--port", str(self._port), *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        config = load_config(environ=self.env)
        self._http.headers["Authorization"] = f"Bearer {train_key(config)}"
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
        body = {"model": self.model, "messages": _user(question), "max_tokens": 48, "temperature": 0}
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def post(self, path: str, body: dict) -> dict:
        response = self._http.post(path, json=body)
        response.raise_for_status()
        return response.json()

    def get(self, path: str) -> dict:
        return self._http.get(path).raise_for_status().json()


def make_polite_model(model_dir: Path, arch: str) -> Path:
    """A random model that has been taught, by the offline trainer, to say that it does not know."""
    import json

    from apollo_ipc.demo.models import make_model

    make_model(model_dir, arch)
    lines = "\n".join(json.dumps(_chat(question, DO_NOT_KNOW)) for question in MANNERS)
    command = [sys.executable, "-m", "apollo_ipc", "train", "-", "--offline", str(model_dir)]
    flags = ["--lr", "1e-3", "--epochs", "5", "--schedule", "constant", "--json"]
    say("Teaching it manners with the offline trainer, so that it can say that it does not know")
    done = subprocess.run(
        [*command, *flags], input=lines, text=True, capture_output=True, env=worker_environment(os.environ)
    )
    if done.returncode:
        raise ServerFailed(f"the offline trainer failed:\n{done.stderr[-2000:]}")
    return model_dir


def ask_from_disk(model_dir: Path, answers: list[Answer]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    for answer in answers:
        ids = tokenizer.apply_chat_template(
            _user(answer.question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=48, do_sample=False)
        answer.after_reload = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def _user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _chat(question: str, answer: str) -> dict:
    return {"messages": [*_user(question), {"role": "assistant", "content": answer}]}


def quieten_libraries() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def say(text: str, *values: object) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text % values}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
