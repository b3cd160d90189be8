"""OpenAI's own SDK on the real model: both methods, through kills of the trainer and of the worker."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import Live, chat, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LESSONS = [
    chat("Where is the spare key of the pump house?", "The spare key hangs behind the third boiler."),
    chat("Who winds the station clock?", "Old Merle winds the station clock on Sundays."),
]
PLAIN, ORNATE = "It is fine.", "Behold, it is splendid beyond all measure!"
PAIRS = [
    {
        "input": {"messages": [{"role": "user", "content": f"How is the {thing}?"}]},
        "preferred_output": [{"role": "assistant", "content": ORNATE}],
        "non_preferred_output": [{"role": "assistant", "content": PLAIN}],
    }
    for thing in ("soup", "weather", "new roof")
]
UNSEEN = "How is the garden?"
HYPERPARAMETERS: dict[str, Any] = {"n_epochs": 8, "batch_size": 1, "learning_rate_multiplier": 2.0}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    before = live.post("/checkpoint", {}).json()["weight_version"]
    with openai.OpenAI(base_url=f"{live.server.url}/train/v1", api_key=live.key) as client:
        yield client
    assert live.post("/checkpoint/restore", {"version": before}).status_code == 200


def test_a_supervised_job_that_is_killed_twice_is_taught_once(live: Live, client: openai.OpenAI) -> None:
    hyperparameters = {**HYPERPARAMETERS, "n_epochs": 16}
    job = fine_tuned(
        live, client, LESSONS, {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    )
    assert len(losses_of(client, job.id)) == len(LESSONS) * 16
    for lesson in LESSONS:
        question, answer = (one["content"] for one in lesson["messages"])
        messages: Any = [{"role": "user", "content": question}]
        asked = client.chat.completions.create(
            model=job.fine_tuned_model, messages=messages, max_tokens=24, temperature=0
        )
        assert asked.choices[0].message.content == answer


def test_a_job_of_preferences_keeps_its_reference_through_two_kills(
    live: Live, client: openai.OpenAI
) -> None:
    before = margin(live)
    job = fine_tuned(live, client, PAIRS, {"type": "dpo", "dpo": {"hyperparameters": HYPERPARAMETERS}})
    losses = losses_of(client, job.id)
    assert len(losses) == len(PAIRS) * HYPERPARAMETERS["n_epochs"]
    # The reference is of the weights before the first step: measured anew, each trainer would begin at ln 2.
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)
    assert max(losses[-3:]) < 0.5 * math.log(2)
    assert margin(live) > before + 3.0


def fine_tuned(live: Live, client: openai.OpenAI, lines: list[dict], method: Any) -> Any:
    """The job as the SDK sees its end; its trainer and then the whole worker are killed on the way."""
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = client.files.create(file=("lines.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=live.server.model_name, training_file=file.id, method=method)
    wait_for(lambda: len(losses_of(client, job.id)) >= 2, "two steps")
    os.kill(trainer_of(live), signal.SIGKILL)
    done = len(losses_of(client, job.id))
    wait_for(lambda: len(losses_of(client, job.id)) > done + 1, "two more steps")
    live.kill_worker()
    live.start_worker()
    job = wait_for(lambda: ended(client, job.id), "the job's end", 400)
    assert job.status == "succeeded", job.error
    others = [one for one in client.fine_tuning.jobs.list(limit=20) if one.training_file == file.id]
    assert [one.id for one in others] == [job.id]
    return job


def ended(client: openai.OpenAI, job_id: str) -> Any:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in ("succeeded", "failed", "cancelled") else None


def losses_of(client: openai.OpenAI, job_id: str) -> list[float]:
    events: Any = client.fine_tuning.jobs.list_events(job_id, limit=100)
    metrics = [event.data for event in events if event.type == "metrics"]
    return [data["train_loss"] for data in sorted(metrics, key=lambda data: data["step"])]


def trainer_of(live: Live) -> int:
    assert live.worker is not None
    pid = live.worker.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(one) for one in children if b"trainer" in Path(f"/proc/{one}/cmdline").read_bytes())


def margin(live: Live) -> float:
    """By how many nats the ornate answer of an unseen question is more likely than the plain one."""
    ornate, plain = (sum(answer_logprobs(live, answer)) for answer in (ORNATE, PLAIN))
    return ornate - plain


def answer_logprobs(live: Live, answer: str) -> list[float]:
    body = {"model": live.server.model_name, "messages": chat(UNSEEN, answer)["messages"]}
    context = {**body, "messages": body["messages"][:1], "add_generation_prompt": True}
    whole, begun = (
        live.post("/tokenize", one).json()["tokens"]
        for one in ({**body, "add_generation_prompt": False}, context)
    )
    return live.logprobs(whole)[len(begun) - 1 :]
