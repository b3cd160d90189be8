"""OpenAI's own client against /train/v1: the real routes, store and queue; training is recording a loss."""

from __future__ import annotations

import threading
import time

import openai
import pytest
from apollo_router.fine_tuning import delivery
from fine_tuning_calls import LINE, add_file, create, jsonl, sentence
from router_harness import TRAIN_KEY, FakeWorker, Server
from starlette.requests import Request
from starlette.responses import JSONResponse

# --- the way that everybody goes ---


def test_a_file_a_job_its_events_its_checkpoint_and_the_model_that_it_became(client, worker, server):
    file = client.files.create(file=("train.jsonl", jsonl(LINE, LINE, LINE)), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    job = client.fine_tuning.jobs.create(
        model="m",
        training_file=file.id,
        suffix="ours",
        seed=7,
        metadata={"run": "1"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 3}},
        },
    )
    assert (job.status, job.seed, job.suffix, job.fine_tuned_model) == ("queued", 7, "ours", None)
    assert job.hyperparameters.n_epochs == 2
    worker.train_one()
    plan = worker.queue.list()[0]
    assert (plan.num_examples, plan.num_steps) == (3, 3)  # the harness plans a step an example
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", "m")
    assert done.finished_at >= done.created_at
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert messages[0].startswith("The job has successfully completed")
    assert messages[-1] == f"Created fine-tuning job: {job.id}"
    assert [m for m in messages if m.startswith("Step")] == [
        "Step 3/3: training loss=0.6667",
        "Step 2/3: training loss=1.0000",
        "Step 1/3: training loss=2.0000",
    ]
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []  # nothing is on disk yet
    worker.queue.mark_durable(1)
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint) == (3, "m")
    assert client.models.retrieve(done.fine_tuned_model).id == "m"
    assert [model.id for model in client.models.list()] == ["m"]


def test_chat_reaches_vllms_own_route_with_the_body_as_it_was_sent(client, worker, server):
    seen = []

    @server.app.post("/v1/chat/completions")
    async def route(request: Request):
        seen.append(await request.json())
        return JSONResponse(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": "hi"},
                    }
                ],
            }
        )

    messages = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(model="m", messages=messages)
    assert answer.choices[0].message.content == "hi"
    assert seen == [{"model": "m", "messages": messages}]
    stranger = openai.OpenAI(base_url=client.base_url, api_key="another key")
    with pytest.raises(openai.PermissionDeniedError):
        stranger.chat.completions.create(model="m", messages=messages)
    assert len(seen) == 1


def test_hyperparameters_become_the_options_of_train(client, worker):
    create(client, hyperparameters={"n_epochs": "auto", "batch_size": 4, "learning_rate_multiplier": 0.5})
    job = worker.queue.take()
    assert job.plan.lr == 0.5 * 1e-5
    assert [event.type for event in client.fine_tuning.jobs.list_events(job.info.idempotency_key)] == [
        "message"
    ] * 4


PREFERENCE = {
    "input": {"messages": [{"role": "user", "content": "2+2="}], "parallel_tool_calls": True},
    "preferred_output": [{"role": "assistant", "content": "4"}],
    "non_preferred_output": [{"role": "assistant", "content": "5"}],
}


@pytest.mark.parametrize(("beta", "is_"), [("auto", 0.1), (0.5, 0.5)])
def test_preferences_become_pairs_of_train(client, worker, beta, is_):
    job = client.fine_tuning.jobs.create(
        model="m",
        training_file=add_file(client, PREFERENCE, PREFERENCE),
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": beta, "n_epochs": 2}}},
    )
    assert (job.method.type, job.method.dpo.hyperparameters.beta) == ("dpo", is_)
    request = worker.requests[-1]
    assert (request.options.loss, request.options.beta, request.options.epochs) == ("dpo", is_, 2)
    pair = request.examples[0]
    assert (pair.messages[0].content, pair.chosen.content, pair.rejected.content) == ("2+2=", "4", "5")
    worker.train_one()
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (LINE, 'a line is an object like {"input"'),
        ({**PREFERENCE, "input": "2+2="}, "input: a preference has an `input` like"),
        ({**PREFERENCE, "preferred_output": []}, "preferred_output: the answer is empty"),
        (
            {**PREFERENCE, "preferred_output": [{"role": "user", "content": "4"}]},
            "preferred_output.role: an answer is the assistant's",
        ),
    ],
)
def test_what_is_wrong_with_a_preference_is_said_at_its_line(client, worker, line, text):
    with pytest.raises(openai.BadRequestError) as raised:
        client.fine_tuning.jobs.create(
            model="m", training_file=add_file(client, PREFERENCE, line), method={"type": "dpo"}
        )
    assert sentence(raised).startswith(f"line 2: {text}")


def test_pages_and_metadata_of_the_list_of_jobs(client, worker):
    ids = [create(client, metadata={"run": str(i)}).id for i in range(3)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"run": "1"})] == [ids[1]]
    files = [file.id for file in client.files.list(limit=2, order="asc")]
    assert len(files) == 3
    assert files == [file.id for file in client.files.list()][::-1]


def test_a_job_is_paused_goes_on_and_is_cancelled(client, worker):
    job = create(client)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert worker.queue.take() is None
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert worker.queue.take() is not None
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    behind = create(client)
    for _ in range(2):  # the second time, as a client whose answer was lost
        assert client.fine_tuning.jobs.cancel(behind.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as raised:
        client.fine_tuning.jobs.pause(behind.id)
    assert "has ended (cancelled)" in sentence(raised)


def test_a_failed_job_says_why(client, worker):
    job = create(client)
    worker.train_one(ends="failed", error="the loss is not finite")
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert (failed.status, failed.error.message) == ("failed", "the loss is not finite")
    assert next(iter(client.fine_tuning.jobs.list_events(job.id))).level == "error"


# --- once ---


def test_a_retry_of_the_sdk_is_the_same_job_and_a_second_call_another_one(client, worker, server):
    file = add_file(client, LINE)
    body = {"model": "m", "training_file": file}
    first, retried, again = (
        server.http.post("/train/v1/fine_tuning/jobs", json=body, headers=headers).json()["id"]
        for headers in ({}, {"x-stainless-retry-count": "1"}, {"x-stainless-retry-count": "0"})
    )
    assert first == retried != again
    assert len(worker.queue.list()) == 2


def test_an_answer_that_is_lost_leaves_one_job(client, worker, server):
    """The SDK gives up on the first answer, which the worker takes too long for, and sends it again."""
    file, admit, waits = add_file(client, LINE), worker.board.admit, threading.Event()

    def slowly(request):
        if not waits.is_set():
            waits.set()
            time.sleep(1.5)
        return admit(request)

    worker.board.admit = slowly
    job = client.with_options(timeout=1.0).fine_tuning.jobs.create(model="m", training_file=file)
    assert [one.idempotency_key for one in worker.queue.list()] == [job.id]


def test_an_idempotency_key_is_one_job_and_another_body_is_refused(client, worker):
    file, key = add_file(client, LINE), {"Idempotency-Key": "one"}
    first, again = (
        client.fine_tuning.jobs.create(model="m", training_file=file, extra_headers=key) for _ in range(2)
    )
    assert first.id == again.id
    with pytest.raises(openai.UnprocessableEntityError):
        client.fine_tuning.jobs.create(model="m", training_file=file, seed=1, extra_headers=key)


def test_a_worker_that_dies_after_it_took_the_job_leaves_one_job(client, worker, config, monkeypatch):
    """The answer is `validating_files`, never 5xx; the worker that comes back gets it with the same key."""
    monkeypatch.setattr(delivery, "WORKER_AWAY_S", 1.0)
    monkeypatch.setattr(delivery, "AGAIN_S", 0.1)
    file, admit = add_file(client, LINE), worker.board.admit

    def dies(request):
        worker.in_background(worker.server.stop)
        time.sleep(0.5)
        return admit(request)

    worker.board.admit = dies
    job = client.with_options(max_retries=0).fine_tuning.jobs.create(model="m", training_file=file)
    assert job.status == "validating_files"
    monkeypatch.setattr(delivery, "WORKER_AWAY_S", 30.0)
    with FakeWorker(config) as back:
        deadline = time.monotonic() + 20
        monkeypatch.setattr(delivery, "WORKER_AWAY_S", 0.5)
        while client.fine_tuning.jobs.retrieve(job.id).status == "validating_files":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [one.idempotency_key for one in back.queue.list()] == [job.id]


def test_without_a_worker_a_job_is_refused_and_forgotten(client, config, monkeypatch):
    monkeypatch.setattr(delivery, "WORKER_AWAY_S", 0.1)
    file = add_file(client, LINE)
    with pytest.raises(openai.InternalServerError) as raised:
        client.with_options(max_retries=0).fine_tuning.jobs.create(model="m", training_file=file)
    assert raised.value.status_code == 503
    assert list(client.fine_tuning.jobs.list()) == []


def test_a_poll_outlasts_a_worker_that_is_away_for_a_moment(client, worker, config):
    job = create(client)
    worker.server.stop()
    worker.queue.close()
    seen = []
    polling = threading.Thread(target=lambda: seen.append(client.fine_tuning.jobs.retrieve(job.id).status))
    polling.start()
    time.sleep(1.0)
    with FakeWorker(config):
        polling.join(20)
    assert seen == ["queued"]


def test_files_and_jobs_survive_a_restart_of_the_server(client, worker, server, config):
    job = create(client)
    server.__exit__()
    with Server() as later:
        again = openai.OpenAI(base_url=f"{later.url}/train/v1", api_key=TRAIN_KEY)
        assert again.fine_tuning.jobs.retrieve(job.id).status == "queued"
        assert again.files.content(job.training_file).text.encode() == jsonl(LINE, LINE)
