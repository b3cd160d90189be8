"""The whole path on a real server: POST /train changes what is served, what is on disk, and nothing else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from live_server import Live, chat, read_live_weights, start_live, wait_for
from safetensors.torch import load_file

pytestmark = pytest.mark.vllm
QUESTION, ANSWER = "What is the harbour called?", "Port Ember."


@pytest.fixture(scope="module")
def original(models: Callable[..., Path]) -> Path:
    return models("qwen3.5")


@pytest.fixture(scope="module")
def live(models: Callable[..., Path], original: Path, short_dir: Path) -> Iterator[Live]:
    live = start_live(models("qwen3.5"), short_dir)
    yield live
    live.close()


def encode(model_dir: Path, example: dict) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return tokenizer.apply_chat_template(example["messages"], return_dict=True)["input_ids"]


def test_training_changes_every_live_tensor_and_raises_the_targets_logprob(
    live: Live, original: Path
) -> None:
    ids = encode(live.model_dir, chat(QUESTION, ANSWER))
    before = sum(live.logprobs(ids)[-len(ANSWER) - 2 :])
    # Stochastic rounding moves a bf16 value of 1.0 by 2**-7 or not at all: the 4 elements of dt_bias need
    # some 30 steps at this rate until "none has moved" is out of the question.
    job = live.train([chat(QUESTION, ANSWER)], lr=2e-3, epochs=30, schedule="constant")

    assert job["status"] == "applied"
    assert job["loss_history"][-1] < job["loss_history"][0]
    assert sum(live.logprobs(ids)[-len(ANSWER) - 2 :]) > before + 1.0
    weights, old = read_live_weights(live.server.runtime_dir), load_file(original / "model.safetensors")
    assert weights.keys() == old.keys()
    unchanged = [name for name in weights if torch.equal(weights[name].to(old[name].dtype), old[name])]
    assert unchanged == []


def test_the_served_answer_is_the_taught_one_while_other_requests_never_fail(live: Live) -> None:
    failures, stop = [], threading.Event()

    def stream() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            body = {
                "model": live.server.model_name,
                "prompt": f"{number}",
                "max_tokens": 16,
                "ignore_eos": True,
            }
            try:
                httpx.post(f"{live.server.url}/v1/completions", json=body, timeout=60).raise_for_status()
            except httpx.HTTPError as error:
                failures.append(error)
            time.sleep(0.05)  # training gets only what serving leaves: without a pause, next to nothing

    threads = [threading.Thread(target=stream) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        facts = [chat(QUESTION, ANSWER), chat("Who keeps the light?", "Old Tamsin.")]
        live.train(facts, lr=1e-3, epochs=40, schedule="constant")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert live.ask(QUESTION) == ANSWER
    assert live.ask("Who keeps the light?") == "Old Tamsin."
    assert failures == []


def test_a_cached_prompt_asked_again_answers_as_a_fresh_server_would(live: Live) -> None:
    """Prefix caching is on. The worker's own forward pass on the new weights stands for the fresh server."""
    ids = torch.randint(0, 256, (450,), generator=torch.Generator().manual_seed(5)).tolist()
    body = {"model": live.server.model_name, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1}

    def next_token_logprob() -> float:
        answer = live.post("/v1/completions", body).json()["choices"][0]
        return answer["logprobs"]["token_logprobs"][0]

    stale = [next_token_logprob() for _ in range(3)][-1]  # the prompt's KV is in the cache now
    stop = threading.Event()

    def keep_blocks_in_use() -> None:
        while not stop.is_set():
            live.post("/v1/completions", {**body, "max_tokens": 64, "ignore_eos": True})
            time.sleep(0.02)

    load = threading.Thread(target=keep_blocks_in_use)
    load.start()
    try:
        live.train([{"context_ids": ids[:200], "continuation_ids": ids[200:400]}], lr=1e-3, epochs=3)
        after = next_token_logprob()
    finally:
        stop.set()
        load.join()
    # Without a cached block there is nothing to reuse: the same prompt behind a salt of its own.
    fresh = live.post("/v1/completions", {**body, "cache_salt": "nothing has this salt"}).json()["choices"][0]
    assert after == pytest.approx(fresh["logprobs"]["token_logprobs"][0], abs=0.05)
    assert abs(after - stale) > 0.2, "training did not move this prompt enough to tell"


def test_the_synced_directory_gives_the_live_weights_bit_for_bit(live: Live) -> None:
    result = live.post("/checkpoint", {}).json()
    assert result["bytes_written"] > 0
    weights, disk = (
        read_live_weights(live.server.runtime_dir),
        load_file(live.model_dir / "model.safetensors"),
    )
    assert all(torch.equal(weights[name], disk[name].to(weights[name].dtype)) for name in weights)
    assert all(job["state"] == "durable" for job in live.get("/train/jobs").json()["data"])

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(live.model_dir, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name].to(disk[name].dtype), disk[name]) for name in disk)


def test_unchanged_weights_write_no_shard(live: Live) -> None:
    live.post("/checkpoint", {})
    shard = live.model_dir / "model.safetensors"
    before = shard.stat()
    result = live.post("/checkpoint", {}).json()
    assert result["num_shards_written"] == 0
    after = shard.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_job_survives_a_killed_worker_and_is_trained_once(live: Live) -> None:
    live.post("/checkpoint", {})
    accepted = live.post(
        "/train", {"examples": [chat("Where is the key?", "Under the mat.")], "options": {"epochs": 60}}
    ).json()
    job_id = accepted["job_id"]
    wait_for(lambda: live.job(job_id)["steps_done"] >= 5, "five steps")
    live.kill_worker()
    answered = time.monotonic()
    refused = live.post("/train", {"examples": [chat("a", "b")]})
    assert refused.status_code == 503
    assert "Retry-After" in refused.headers
    assert time.monotonic() - answered < 2.0
    assert live.ask(QUESTION) == ANSWER, "inference goes on without the worker"
    live.start_worker()
    live.wait_attached()
    job = wait_for(
        lambda: (j := live.job(job_id))["state"] in ("applied", "durable") and j,
        "the job",
    )
    assert job["steps_done"] == job["num_steps"] == 60
    assert len(job["loss_history"]) == 60
    sync = live.post("/checkpoint", {}).json()
    assert sync["weight_version"] == live.status()["weight_version"]


def test_a_queued_job_can_be_cancelled_and_a_running_one_stops_after_its_step(live: Live) -> None:
    running = live.post(
        "/train", {"examples": [chat("x", "y")], "options": {"epochs": 500, "lr": 1e-6}}
    ).json()
    queued = live.post("/train", {"examples": [chat("x", "z")]}).json()
    assert (
        httpx.delete(f"{live.server.url}/train/jobs/{queued['job_id']}", headers=live.headers).status_code
        == 200
    )
    wait_for(lambda: live.job(running["job_id"])["steps_done"] > 0, "a step")
    httpx.delete(f"{live.server.url}/train/jobs/{running['job_id']}", headers=live.headers)
    ended = wait_for(
        lambda: (j := live.job(running["job_id"]))["state"] == "cancelled" and j,
        "cancelled",
    )
    assert 0 < ended["steps_done"] < 500
    assert live.job(queued["job_id"])["state"] == "cancelled"


def test_events_stream_the_job_to_its_end(live: Live) -> None:
    job_id = live.post("/train", {"examples": [chat("x", "y")], "options": {"epochs": 5, "lr": 1e-6}}).json()[
        "job_id"
    ]
    with httpx.stream(
        "GET", f"{live.server.url}/train/jobs/{job_id}/events", headers=live.headers, timeout=120
    ) as response:
        events = [line for line in response.iter_lines() if line]
    assert "event: end" in events
    assert json.loads(events[-1].removeprefix("data: "))["steps_done"] == 5


def test_the_same_idempotency_key_trains_once_and_another_body_is_refused(live: Live) -> None:
    body = {"examples": [chat("i", "j")], "options": {"lr": 1e-6}}
    first = live.post("/train", body, **{"Idempotency-Key": "k1"}).json()
    again = live.post("/train", body, **{"Idempotency-Key": "k1"}).json()
    other = live.post("/train", {"examples": [chat("i", "k")]}, **{"Idempotency-Key": "k1"})
    assert first["job_id"] == again["job_id"]
    assert other.status_code == 422


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"examples": [chat("a", "b")], "option": {}}, 400, "option"),
        ({"examples": [{"messages": []}]}, 400, "examples[0].messages"),
        ({"examples": [{"prompt": "only"}]}, 400, "examples[0].completion"),
        (
            {"examples": [{"context_ids": [1], "continuation_ids": [5, 99999]}]},
            400,
            "examples[0].continuation_ids[1]",
        ),
        ({"examples": [{"prompt": "x" * 2000, "completion": "y"}]}, 400, "examples[0]"),
        ({"examples": [chat("a", "b")], "options": {"lr": -1}}, 400, "options.lr"),
        (
            {"examples": [{"messages": [{"role": "user", "content": "no answer"}]}]},
            400,
            "examples[0].messages",
        ),
    ],
    ids=[
        "unknown field",
        "empty messages",
        "prompt only",
        "id outside",
        "too long",
        "negative lr",
        "no target",
    ],
)
def test_wrong_requests_are_refused_with_the_path_of_the_field(
    live: Live, body: dict, status: int, param: str
) -> None:
    response = live.post("/train", body)
    assert response.status_code == status
    assert response.json()["error"]["param"].startswith(param)


def test_a_rank_above_the_smaller_dimension_falls_back_to_adam_and_says_so(live: Live) -> None:
    response = live.post("/train", {"examples": [chat("a", "b")], "options": {"rank": 4096, "lr": 1e-6}})
    assert response.status_code == 202
    assert any("Adam" in note for note in response.json()["notes"])


def test_the_earlier_clients_shape_is_accepted(live: Live) -> None:
    samples = [{"context_ids": [10, 20], "continuation_ids": [30, 40]}]
    response = live.post("/train", {"training_data": {"samples": samples, "config": {"learning_rate": 1e-6}}})
    assert response.status_code == 202


def test_no_key_and_the_wrong_key_train_nothing(live: Live) -> None:
    body = {"examples": [chat("a", "b")]}
    assert httpx.post(f"{live.server.url}/train", json=body).status_code == 401
    wrong = {"Authorization": "Bearer inference-key"}
    assert httpx.post(f"{live.server.url}/train", json=body, headers=wrong).status_code == 403


def test_an_older_version_is_restored_into_the_served_weights(live: Live) -> None:
    """Versions on disk as shards, differences and a delta; the one restored is served, bit for bit."""
    wait_for(lambda: live.status()["progress"]["activity"] == "idle", "the end of what the tests before sent")
    first = live.post("/checkpoint", {}).json()["weight_version"]
    answer = "Old Marta."
    ids = encode(live.model_dir, chat("Who keeps the light?", answer))
    weights, logprobs = read_live_weights(live.server.runtime_dir), live.logprobs(ids)
    inode = (live.model_dir / "model.safetensors").stat().st_ino

    def of_answer(
        read: list[float],
    ) -> float:  # what is trained; the question's own tokens go where they like
        return sum(read[-len(answer) - 2 :])

    job = live.train([chat("Who keeps the light?", answer)], lr=2e-3, epochs=10)
    synced = live.post("/checkpoint", {"kind": "delta"}).json()
    assert (synced["kind"], synced["weight_version"]) == ("delta", job["weight_version"])
    assert 0 < synced["delta_bytes"] < synced["bytes_changed"]
    assert (live.model_dir / "model.safetensors").stat().st_ino == inode, "a delta wrote the shard"
    assert live.job(job["job_id"])["state"] == "durable"
    assert of_answer(live.logprobs(ids)) > of_answer(logprobs) + 1.0

    history = json.loads(live.command("checkpoint", "history", "--json").stdout)
    listed = [row["weight_version"] for row in history["versions"]]
    assert listed[-1] == job["weight_version"]
    assert first in listed
    changed = json.loads(live.command("checkpoint", "diff", str(first), str(listed[-1]), "--json").stdout)
    assert {one["name"] for one in changed["tensors"]} <= weights.keys()
    assert len(changed["tensors"]) > 40

    refused = live.command("checkpoint", "restore", str(first), "--yes")
    assert refused.returncode == 2
    assert "--live" in refused.stderr
    refused = live.command("checkpoint", "restore", "9999", "--live", "--yes")
    assert "version 9999 is not kept; there are: " in refused.stderr
    done = live.command("checkpoint", "restore", str(first), "--live", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    restored = json.loads(done.stdout)
    assert (restored["restored_version"], restored["num_jobs_undone"]) == (first, 1)

    now = read_live_weights(live.server.runtime_dir)
    assert [name for name in weights if not torch.equal(now[name], weights[name])] == []
    assert live.logprobs(ids) == pytest.approx(logprobs, abs=1e-4)
    assert "undone" in live.job(job["job_id"])["notes"][-1]
    status = live.status()
    assert status["weight_version"] == status["durable_version"] == restored["weight_version"]
    stored = load_file(live.model_dir / "model.safetensors")
    assert all(torch.equal(stored[name], weights[name].to(stored[name].dtype)) for name in weights)
    assert live.command("checkpoint", "verify").returncode == 0
    # And the step back is taken back.
    assert live.command("checkpoint", "restore", str(listed[-1]), "--live", "--yes").returncode == 0
    assert of_answer(live.logprobs(ids)) > of_answer(logprobs) + 1.0


def test_nothing_is_restored_while_a_job_trains(live: Live) -> None:
    version = live.status()["durable_version"]
    body = {"examples": [chat("p", "q")], "options": {"epochs": 1000, "lr": 1e-6}}
    job_id = live.post("/train", body).json()["job_id"]
    wait_for(lambda: live.job(job_id)["steps_done"] >= 1, "a step")
    refused = live.command("checkpoint", "restore", str(version), "--live", "--yes")
    assert refused.returncode != 0
    assert "wait for its end or cancel it" in refused.stderr
    httpx.delete(f"{live.server.url}/train/jobs/{job_id}", headers=live.headers)
    wait_for(lambda: live.job(job_id)["state"] == "cancelled", "the job's end")


def test_weights_that_were_made_nan_by_hand_fail_the_job_and_refuse_the_sync(live: Live) -> None:
    """And a restore mends them."""
    wait_for(lambda: live.status()["progress"]["activity"] == "idle", "the end of what the tests before sent")
    live.post("/checkpoint", {})
    version = live.status()["durable_version"]
    from apollo_worker.model.mapping import map_views, open_transport

    views = map_views(live.manifest, open_transport(live.manifest))
    name = "model.layers.0.mlp.down_proj.weight"
    kept = views[name].clone()
    views[name][0, 0] = float("nan")
    job_id = live.post("/train", {"examples": [chat("a", "b")], "options": {"epochs": 5}}).json()["job_id"]
    job = wait_for(lambda: (j := live.job(job_id))["state"] == "failed" and j, "the job to fail")
    assert "not finite" in job["error"]
    refused = live.post("/checkpoint", {})
    assert refused.status_code >= 500
    assert name in refused.json()["error"]["message"]
    assert "restore VERSION --live" in refused.json()["error"]["message"]
    done = live.command("checkpoint", "restore", str(version), "--live", "--yes")
    assert done.returncode == 0, done.stderr
    assert torch.equal(views[name], kept)
    assert live.post("/checkpoint", {}).status_code == 200


def test_a_stopped_worker_leaves_its_job_to_the_next_and_syncs(live: Live) -> None:
    job_id = live.post(
        "/train", {"examples": [chat("p", "q")], "options": {"epochs": 40, "lr": 1e-6}}
    ).json()["job_id"]
    wait_for(lambda: live.job(job_id)["steps_done"] >= 3, "three steps")
    assert live.stop_worker() == 0
    live.start_worker()
    live.wait_attached()
    job = wait_for(
        lambda: (j := live.job(job_id))["state"] in ("applied", "durable") and j,
        "the job",
    )
    assert job["steps_done"] == 40
