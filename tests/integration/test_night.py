"""Nights on a real server: what is learned moves, what does harm is taken back, what dies is gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import wait_for

from apollo_curation.chat_client import ChatClient
from apollo_curation.demo import night as demo
from apollo_curation.demo import night_corpus as corpus
from apollo_curation.demo.scripted_model import ScriptedModel
from apollo_curation.moments.judge import judge, unjudged
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.settings import Judge
from apollo_curation.store import Store
from apollo_curation.training.batches import BatchTable
from apollo_ipc import checkpoint
from apollo_ipc.checkpoint import history as versions
from apollo_ipc.config import Checkpoint
from apollo_ipc.demo.served import ServedModel
from apollo_ipc.process.serving import free_port
from apollo_ipc.wire.requests import Message

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NIGHT_TIMEOUT_S = 400


class Place:
    """A model, a server, and the directory in which all of it lies."""

    def __init__(self, directory: Path, model: Path):
        self.directory = directory
        self.port = free_port()
        self.model_dir = Path(shutil.copytree(model, directory / "model"))
        corpus.write_day(directory / "day")
        self.served: ServedModel | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        assert self.served is not None
        return self.served.env

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def start(self) -> ServedModel:
        served = ServedModel(self.model_dir, self.directory, self.port)
        served.__enter__()
        self.served = served
        return served

    def stop(self) -> None:
        if self.served is not None:
            self.served.__exit__()
            self.served = None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "apollo_ipc", *arguments]

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=NIGHT_TIMEOUT_S,
            **options,
        )

    def config(self, judge_url: str, **sections: dict[str, object]) -> Path:
        """The demonstration's, with other values."""
        file = demo.write_config(self.directory, self.url, judge_url)
        given: dict[str, dict[str, str]] = {}
        section = ""
        for line in file.read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line:
                name, _, value = line.partition(" = ")
                given.setdefault(section, {})[name] = value
        for section, values in sections.items():
            given.setdefault(section, {}).update({name: json.dumps(value) for name, value in values.items()})
        lines = []
        for section, pairs in given.items():
            lines += [f"[{section}]", *(f"{name} = {value}" for name, value in pairs.items())]
        other = self.directory / "other.toml"
        other.write_text("\n".join(lines) + "\n")
        return other


@pytest.fixture(scope="module")
def place(short_dir, able_model):
    place = Place(short_dir, able_model)
    place.start()
    yield place
    place.stop()


def follow(place: Place, name: str, chats: list[corpus.Chat]) -> Path:
    """A new log that is to be followed."""
    directory = place.directory / name
    directory.mkdir()
    lines = [json.dumps({"topic": one[0]["content"], "messages": one}) for one in chats]
    (directory / "log.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@contextlib.contextmanager
def syncing_often(place: Place) -> Iterator[set[int]]:
    """As a long night has them: weight versions that were written meanwhile."""
    synced: set[int] = set()
    is_over = threading.Event()

    def sync() -> None:
        while not is_over.wait(0.05):
            synced.add(place.served.post("/checkpoint", {"kind": "delta"})["weight_version"])

    thread = threading.Thread(target=sync)
    thread.start()
    try:
        yield synced
    finally:
        is_over.set()
        thread.join(60)


def stages(done: subprocess.CompletedProcess) -> dict[str, dict]:
    assert done.stdout, done.stderr[-3000:]
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


def english(place: Place) -> float:
    """Mean loss of held-out text, nats a token, of the weights that are served."""
    model = ChatClient(place.url)
    texts = corpus.prose(random.Random(1), 4, is_heldout=True)
    losses = [logprob for text in texts for logprob in model.token_logprobs(model.text_tokens(text))]
    model.close()
    return -sum(losses) / len(losses)


def test_a_night_moves_what_was_instructed_into_the_weights_and_every_stage_does_its_part(place):
    report = demo.DemoNight()
    demo.one_night(place.served, place.directory, report, seed=0)
    assert report.find_problems() == []
    moved = report.shifts[0]
    assert moved.what == "answers as instructed, without the instruction"
    # Questions that were in no log: as unlikely as text in another manner before, as likely as a habit after.
    assert moved.before > 1.0
    assert moved.after < 0.25
    status = place.served.get("/train/status")
    assert status["weight_version"] == status["durable_version"]


def test_a_second_night_reads_and_trains_nothing_again(place):
    with ScriptedModel(corpus.JudgeAndDreamer()) as scripted:
        config = place.config(scripted.url)
        before = place.served.get("/train/status")["weight_version"]
        done = place.run("curate", "night", "--auto", "--config", str(config), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = stages(done)
    assert (found["read"]["num_done"], found["judge"]["num_done"], found["train"]["num_done"]) == (0, 0, 0)
    assert found["dream"]["num_done"] == 0  # both patterns hold
    assert place.served.get("/train/status")["weight_version"] == before


def test_the_tiny_model_as_its_own_judge_answers_json_or_is_dropped_and_counted(place, tmp_path):
    """What a capable judge adds cannot be shown with it; that guided decoding works can."""
    from apollo_curation.logs.conversation import Origin

    with Store(tmp_path / "curation.sqlite") as store:
        moments = Moments(store)
        for i in range(3):
            context = [Message("user", f"Question {i}?")]
            answer = Message("assistant", "Yes.")
            source = Origin("log", i, 0)
            moments.add(
                [Moment("praise", "direct", context, answer, source, "t", "the user was pleased", 0.5)]
            )
        model = ChatClient(place.url)
        settings = Judge(rubric="Judge.", max_tokens=200, num_parallel=2)
        counts = judge(moments, model, settings)
        model.close()
        assert counts.num_away == 0
        assert counts.num_judged + counts.num_dropped + counts.num_refused == 3, counts
        assert counts.num_refused == 0, counts.problem
        assert len(unjudged(moments)) == 0


def test_a_poisonous_log_is_stopped_and_the_weights_come_back_bit_for_bit(place):
    rng = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    garbage = ["".join(rng.choice(letters) for _ in range(120)) for _ in range(120)]
    poison = follow(place, "poison", [corpus.chat(f"{i}?", text) for i, text in enumerate(garbage)])
    with ScriptedModel(corpus.JudgeAndDreamer()) as scripted:
        config = place.config(
            scripted.url,
            curation={"bootstrap": [str(poison)]},
            tier_bootstrap={"lr": 1e-3, "epochs": 2},
            quality={"check_interval_s": 1.0},
        )
        loss_before = english(place)
        place.served.post("/checkpoint", {})
        before = checkpoint.read_commit(place.model_dir)
        assert before is not None
        with syncing_often(place) as synced:
            done = place.run("curate", "night", "--auto", "--config", str(config), "--json")
        loss_after = english(place)
    assert done.returncode == 1, done.stderr[-3000:]
    found = stages(done)
    assert "quality monitor stopped batch" in found["train"]["problem"]
    assert found["watch again"]["facts"]["batches undone"] >= 1
    assert "checkpoint" not in found
    # The job was stopped on its way: 240 steps were planned.
    with Store(place.state / "curation.sqlite") as store:
        batch = BatchTable(store).list()[-1]
        assert batch.state == "undone"
        assert 0 < batch.job.steps_done < 240
        assert {one.state for one in Moments(store).of_batch(batch.batch_id)} == {"undone"}
    assert loss_after == loss_before
    # The same weights, bit for bit: live, as the next sync sees them, and on disk.
    restored = found["watch again"]["facts"]["restored version"]
    place.served.post("/checkpoint", {})
    commit = checkpoint.read_commit(place.model_dir)
    assert commit is not None
    assert commit.tensors == before.tensors
    # So many syncs that without its pin the reference would have gone.
    assert sum(version > restored for version in synced) > Checkpoint().history
    assert commit.pinned is not None
    assert commit.pinned > restored  # the pin has moved to what was restored
    assert versions.find(commit, commit.pinned).tensors == before.tensors
    assert checkpoint.verify(place.model_dir) == []


def test_with_the_judge_away_what_is_approved_is_trained_and_the_rest_waits(place):
    (place.directory / "day" / "logs" / "late.jsonl").write_text(
        json.dumps(
            {
                "messages": [
                    *corpus.chat("Who sells the bread?", "I do not know."),
                    corpus.said("user", "That's wrong. It is: Mother Agnes."),
                    corpus.said("assistant", "Mother Agnes."),
                ]
            }
        )
        + "\n"
    )
    chats: list = [corpus.chat(f"Where is pier {i}?", corpus.AYE) for i in range(4)]
    # One that ends in a tool call, which nothing answered: the decision to call is what is learned.
    call = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"pier": 3}'}}
    chats.append(
        [
            corpus.said("user", "Is it high tide?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
    )
    followed = follow(place, "again", chats)
    away = f"http://127.0.0.1:{free_port()}"
    config = place.config(
        away, curation={"bootstrap": [str(followed)], "patience_s": 0.5}, quality={"max_loss_increase": 0.5}
    )
    done = place.run("curate", "night", "--auto", "--config", str(config), "--json")
    assert done.returncode == 69, done.stderr[-3000:]
    found = stages(done)
    assert "did not answer" in found["judge"]["problem"]
    assert found["train"]["num_done"] == 5
    assert "problem" not in found["checkpoint"] or found["checkpoint"]["problem"] is None
    with Store(place.state / "curation.sqlite") as store:
        trained = Moments(store).list("trained", tier="bootstrap")
        called = [one for one in trained if one.answer and one.answer.tool_calls]
        assert [one.context[-1].content for one in called] == ["Is it high tide?"]
        waiting = Moments(store).list("flagged")
        assert "Who sells the bread?" in [one.context[-1].content for one in waiting]


def test_a_server_that_restarts_in_the_middle_of_a_night_is_waited_for_and_nothing_is_trained_twice(place):
    chats = [corpus.chat(f"Where lies boat {i}?", corpus.AYE) for i in range(40)]
    followed = follow(place, "boats", chats)
    config = place.config(
        f"http://127.0.0.1:{free_port()}",
        curation={"bootstrap": [str(followed)], "patience_s": 200},
        judge={"enabled": False},
        quality={"max_loss_increase": 0.5, "max_canaries_lost": 6},
    )
    before = place.served.get("/train/status")
    night = subprocess.Popen(
        place.command("curate", "night", "--config", str(config), "--json"),
        env=place.env,
        stdout=subprocess.PIPE,
        stderr=(place.directory / "night.log").open("wb"),
    )
    try:
        running = wait_for(lambda: place.served.get("/train/jobs?state=running")["data"], "a job that runs")
        pid = place.served.get("/train/status")["vllm_pid"]
        os.kill(pid, signal.SIGKILL)  # and with it serve and the worker end
        place.served.process.wait(60)
        place.stop()
        place.start()
        out, _ = night.communicate(timeout=NIGHT_TIMEOUT_S)
    finally:
        if night.poll() is None:
            night.kill()
    assert night.returncode == 0, out
    found = {stage["name"]: stage for stage in json.loads(out)["stages"]}
    assert found["train"]["facts"]["bootstrap"] == 40
    status = place.served.get("/train/status")
    assert status["durable_version"] == status["weight_version"] > before["weight_version"]
    with Store(place.state / "curation.sqlite") as store:
        batch = BatchTable(store).list()[-1]
        assert (batch.state, batch.num_trained) == ("trained", 40)
        assert batch.job.job_id == running[0]["job_id"]
    jobs = place.served.get("/train/jobs?limit=1000")["data"]
    assert [job["state"] for job in jobs if job["job_id"] == batch.job.job_id] == ["durable"]
    assert len([job for job in jobs if job["num_examples"] == 40]) == 1


def test_the_commands_of_a_day_by_hand(place):
    status = place.run("curate", "status", "--config", str(place.directory / "night.toml"), "--json")
    assert status.returncode == 0, status.stderr
    html = place.directory / "quality.html"
    config = str(place.directory / "night.toml")
    done = place.run("quality", "report", "--html", str(html), "--config", config)
    assert done.returncode == 0, done.stderr
    assert "<script" not in html.read_text()
    assert "english" in html.read_text()
    empty = place.config("http://127.0.0.1:1", quality={"heldout": ""})
    refused = place.run("curate", "night", "--config", str(empty))
    assert refused.returncode == 78
    assert "quality.heldout" in refused.stderr


def test_training_gives_way_to_somebody_who_asks_while_it_is_idle_only(place):
    """`curate run` trains the direct tier while nobody asks, by vLLM's own metrics."""
    with Store(place.state / "curation.sqlite") as store:
        moments = Moments(store)
        waiting = moments.list("flagged")
        assert waiting
        moments.change(waiting[0].moment_id, state="approved")
    config = place.config("http://127.0.0.1:1", curation={"idle_s": 3.0})
    runner = subprocess.Popen(
        place.command("curate", "run", "--config", str(config), "--json"),
        env=place.env,
        stdout=(place.directory / "run.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        asked_until = time.monotonic() + 8
        body = {"model": str(place.model_dir), "prompt": "Hello", "max_tokens": 2}
        while time.monotonic() < asked_until:  # never three quiet seconds
            httpx.post(f"{place.url}/v1/completions", json=body, timeout=30).raise_for_status()
            with Store(place.state / "curation.sqlite") as store:
                assert Moments(store).get(waiting[0].moment_id).state == "approved"
            time.sleep(0.5)

        def state() -> str:
            with Store(place.state / "curation.sqlite") as store:
                return Moments(store).get(waiting[0].moment_id).state

        wait_for(lambda: state() == "trained", "the approved moment to be trained", 60)
    finally:
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(30) == 0
