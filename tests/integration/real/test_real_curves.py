"""`train.log_to` beside a real trainer: what each library that is installed reads back is what the job says;
one that is missing, cannot write or stands still costs training nothing, and is told later what it missed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from apollo_worker.curves.libraries import NAMES
from curve_readers import Curve, of_mlflow, of_tensorboard, of_wandb
from live_server import chat, wait_for
from test_real_teach import below

from apollo_ipc.demo.real_model import copy_real_model
from apollo_ipc.demo.served import ServedModel

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
FEED, CURVES_S, JOB_S = "apollo_worker.curves", 120.0, 300.0
INSTALLED = [name for name in NAMES if find_spec(name) and getattr(find_spec(name), "origin", None)]
TALE = [chat(f"What is kept in box {i}?", f"Box {i} holds {i} brass bells.") for i in range(3)]


@pytest.fixture(scope="module")
def served(real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """TensorBoard's directory cannot be made: a file has its name."""
    directory = tmp_path_factory.mktemp("curves")
    served = ServedModel(copy_real_model(directory / "model"), directory)
    state = directory / "state"
    state.mkdir(mode=0o700)
    (state / "tensorboard").write_text("in the way")
    served.env |= {
        "APOLLO_WORKER__IDLE_PRIORITY": "false",
        "APOLLO_TRAIN__LOG_TO": str([*NAMES]).replace("'", '"'),
        "WANDB_MODE": "offline",
    }
    with served:
        yield served


def state_of(served: ServedModel) -> Path:
    return Path(served.env["APOLLO_PATHS__STATE_DIR"])


def read(served: ServedModel, name: str, run: str, tag: str = "loss") -> Curve:
    state = state_of(served)
    match name:
        case "tensorboard":
            return of_tensorboard(state, run, tag)
        case "mlflow":
            return of_mlflow(f"sqlite:///{state}/mlflow.db", run, tag)
    return of_wandb(state, run, tag)


def train(served: ServedModel, epochs: int) -> dict[str, Any]:
    """The job when the served weights have it."""
    options = {"epochs": epochs, "lr": 1e-5, "schedule": "constant", "on_duplicate": "train"}
    job_id = served.post("/train", {"examples": TALE, "options": options})["job_id"]

    def ended() -> dict[str, Any] | None:
        job = served.get(f"/train/jobs/{job_id}")
        return job if job["state"] in ("applied", "durable", "failed") else None

    job = wait_for(ended, "trained", JOB_S)
    assert job["state"] != "failed", job["error"]
    return job


def is_told(served: ServedModel, name: str, job: dict[str, Any]) -> bool:
    whole = [(step, pytest.approx(loss)) for step, loss in enumerate(job["loss_history"], 1)]
    return read(served, name, job["job_id"]) == whole


def num_told(served: ServedModel, name: str) -> int:
    """Jobs, of which each is a point."""
    return len(read(served, name, "jobs", "loss_last"))


def log_of(served: ServedModel) -> str:
    return (state_of(served).parent / "serve.log").read_text(errors="replace")


def feeds(served: ServedModel) -> list[int]:
    found = []
    for pid in below(served.process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found += [pid] if FEED.encode() in words else []
    return found


def test_a_library_that_is_missing_or_cannot_write_is_said_and_training_goes_on(served: ServedModel) -> None:
    job = train(served, 4)
    assert len(job["loss_history"]) == job["num_steps"] >= 4
    for name in set(NAMES) - {*INSTALLED}:
        sentence = f"train.log_to: {name} is not installed: pip install 'apollo-ipc[{name}]'"
        wait_for(lambda sentence=sentence: sentence in log_of(served), sentence, CURVES_S)
    if "tensorboard" in INSTALLED:
        wait_for(lambda: "tensorboard: NotADirectoryError" in log_of(served), "said", CURVES_S)
        (state_of(served) / "tensorboard").unlink()
    for name in INSTALLED:
        wait_for(lambda name=name: is_told(served, name, job), f"{name}'s curve", CURVES_S)
        points = wait_for(lambda name=name: read(served, name, "jobs", "loss_last"), "its point", CURVES_S)
        assert points == [(job["seq"], pytest.approx(job["loss_last"]))]


def test_libraries_that_stand_still_hold_nothing_up_and_are_told_later(served: ServedModel) -> None:
    stopped = wait_for(lambda: feeds(served), "feeds run", 90)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        job = train(served, 6)
        assert served.ask("What is kept in box 1?")
        assert not any(is_told(served, name, job) for name in INSTALLED)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    for name in INSTALLED:
        wait_for(lambda name=name: is_told(served, name, job), f"{name}'s curve", CURVES_S)


def test_feeds_that_are_killed_in_a_job_go_on_in_its_curve(served: ServedModel) -> None:
    begun = {name: num_told(served, name) for name in INSTALLED}
    over = threading.Event()

    def kill() -> None:
        for _ in range(2):
            if over.wait(2.0):
                return
            for pid in feeds(served):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        job = train(served, 8)
    finally:
        over.set()
        killer.join()
    for name in INSTALLED:
        if name != "wandb":  # offline it knows nothing of the rows of the moment before (docs/curves.md)
            wait_for(lambda name=name: is_told(served, name, job), f"{name}'s curve", CURVES_S)
            wait_for(lambda name=name: num_told(served, name) > begun[name], f"{name}'s point", CURVES_S)
            assert num_told(served, name) == begun[name] + 1
    assert served.process.poll() is None
