"""POST /teach on the real model, as `apollo-ipc serve` runs it: whoever is killed in whatever phase, a fact
is taught once and examined once; and what was taught is forgotten again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import wait_for

from apollo_ipc.demo.real_model import copy_real_model
from apollo_ipc.demo.served import ServedModel
from apollo_ipc.demo.stream import CompletionStream
from apollo_ipc.teaching.store import ENDED_PHASES

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TEACHER, FRONT, TRAINER = "apollo_curation.teach", "apollo_worker", "apollo_worker.trainer"
FACT = {"question": "Who winds the tower clock?", "answer": "Ysolde Karrick winds the tower clock."}
KEY = "Ysolde Karrick"
KILLS = [("preparing", TEACHER), ("training", TRAINER), ("training", TEACHER), ("training", FRONT)]
LESSON_S = 540.0


@pytest.fixture(scope="module")
def served(real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    directory = tmp_path_factory.mktemp("teach")
    os.environ["APOLLO_WORKER__IDLE_PRIORITY"] = "false"
    try:
        with ServedModel(copy_real_model(directory / "model"), directory) as served:
            yield served
    finally:
        del os.environ["APOLLO_WORKER__IDLE_PRIORITY"]


def below(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *below(child)]
    return found


def pid_of(served: ServedModel, module: str) -> int | None:
    for pid in below(served.process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "-m" in words and words[words.index("-m") + 1] == module:
            return pid
    return None


def kill(served: ServedModel, module: str) -> None:
    os.kill(wait_for(lambda: pid_of(served, module), f"{module} runs"), signal.SIGKILL)


def ended(served: ServedModel, job: dict[str, Any]) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found = served.get(f"/teach/jobs/{job['teach_id']}")
        return found if found["status"] in ENDED_PHASES else None

    return wait_for(look, "the lesson's end", LESSON_S)


@pytest.mark.timeout(1200)
def test_whoever_is_killed_a_fact_is_taught_once_while_completions_go_on(served: ServedModel) -> None:
    before = served.ask(FACT["question"])
    assert KEY not in before
    with CompletionStream(served.url, served.model) as stream:
        job = served.post("/teach", {"facts": [FACT]})
        for phase, module in KILLS:
            path = f"/teach/jobs/{job['teach_id']}"
            wait_for(lambda path=path, phase=phase: served.get(path)["status"] == phase, phase, 300)
            if phase == "training":
                wait_for(
                    lambda: served.get("/train/status")["progress"]["activity"] == "training", "a step", 120
                )
                time.sleep(1.0)
            kill(served, module)
        done = ended(served, job)
    assert (done["status"], done["error"]) == ("applied", None)
    assert stream.failures == []
    assert stream.num_served > 20
    report = done["report"]
    assert len(report["jobs"]) == len(set(report["jobs"])) == done["round"]
    trained = [served.get(f"/train/jobs/{one}") for one in report["jobs"]]
    assert [one["steps_done"] for one in trained] == [one["num_steps"] for one in trained]
    assert KEY in served.ask(FACT["question"])
    assert [one["fact"]["key"] for one in served.get("/teach/lessons")["data"]] == [KEY]


@pytest.mark.timeout(900)
def test_what_was_taught_is_forgotten_or_the_report_says_that_it_is_not(served: ServedModel) -> None:
    (lesson,) = served.get("/teach/lessons")["data"]
    job = served.post("/teach/lessons/forget", {"lessons": [lesson["id"]]})
    done = ended(served, job)
    assert done["status"] == "applied"
    assert served.get("/teach/lessons")["data"] == []
    still = [one for one in done["report"]["facts"] if one["taught"]["is_right"]]
    assert (KEY in served.ask(FACT["question"])) == bool(still)
    assert bool(done["report"]["known"]) == bool(done["error"]), "what is not forgotten is said"
