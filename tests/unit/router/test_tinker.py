"""Tinker's own client against /train/tinker: the real routes, store and queue; training is recording a loss,
and the model gives each token a log-probability that its id says."""

from __future__ import annotations

import math
import os
import queue
import threading
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import numpy as np
import pytest
from apollo_router.tinker.store import TinkerStore, store_path
from router_harness import TRAIN_KEY, FakeWorker, Server, share_weights
from starlette.requests import Request
from starlette.responses import JSONResponse
from waiting import wait_for

from apollo_ipc.wire.messages import SyncCheckpoint
from apollo_ipc.wire.replies import PinResult, RestoreResult, SyncResult

tinker = pytest.importorskip("tinker", reason="the extra `tinker` is not installed")
from tinker import types  # noqa: E402

ADAM = types.AdamParams(learning_rate=1e-4, beta1=0.8, beta2=0.95, eps=1e-9)
PREFIX = "/train/tinker/api/v1"


def logprob(token: int) -> float:
    return -token / 100


def serve_completions(server):
    """As vLLM does, but it says 7, 8. The bodies that it got."""
    bodies = []

    @server.app.post("/v1/completions")
    async def route(request: Request):
        bodies.append(body := await request.json())
        if len(body["prompt"]) > 40:
            error = {"error": {"message": "the prompt is too long", "type": "x", "code": 400}}
            return JSONResponse(error, 400)
        choice = {
            "finish_reason": "stop" if body["max_tokens"] > 1 else "length",
            "token_ids": [7, 8][: body["max_tokens"]],
            "logprobs": {"token_logprobs": [logprob(7), logprob(8)][: body["max_tokens"]]},
        }
        if "prompt_logprobs" in body:
            rows = [{str(token): {"logprob": logprob(token)}} for token in body["prompt"][1:]]
            choice["prompt_logprobs"] = [None, *rows]
        return JSONResponse({"choices": [choice] * body.get("n", 1)})

    return bodies


@pytest.fixture
def asked(server):
    return serve_completions(server)


def make_service(server, key=TRAIN_KEY):
    return tinker.ServiceClient(base_url=f"{server.url}/train/tinker", api_key=f"tml-{key}")


@pytest.fixture
def told(worker):
    """What the trainer was asked between two steps: it syncs as version 3, and restores."""
    told, stop = [], threading.Event()

    def answer() -> None:
        while not stop.is_set():
            with suppress(queue.Empty):
                asked = worker.board.asked.get(timeout=0.05)
                told.append(asked.request)
                is_sync = isinstance(asked.request, SyncCheckpoint)
                synced = SyncResult(3, 1.0, 10, 2, 1, 1000, 200, 0.5)
                asked.done.set_result(synced if is_sync else RestoreResult(3, 6, 1, 0, 0, True, 0.1))

    thread = worker.in_background(answer)
    yield told
    stop.set()
    thread.join(10)


@pytest.fixture
def service(server, worker, asked, told):
    with make_service(server) as service:
        yield service


@pytest.fixture
def training(service):
    return service.create_lora_training_client(base_model="m", rank=0).result()


def datum(tokens, **inputs):
    """The tokens are learned from the second on."""
    values = {"target_tokens": np.array(tokens[1:]), **{k: np.array(v) for k, v in inputs.items()}}
    arrays = {
        name: types.TensorData.from_numpy(value.astype(np.int64 if name == "target_tokens" else np.float32))
        for name, value in values.items()
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=arrays)


def sentence(raised) -> str:
    return str(raised.value)


# --- the way that everybody goes ---


def test_a_step_is_one_job_of_all_forward_backwards_before_it(training, worker, asked):
    first = training.forward_backward(
        [datum([1, 2, 3, 4], weights=[0, 1, 0.5]), datum([5, 6], weights=[-2])], "cross_entropy"
    )
    second = training.forward_backward([datum([9, 10, 11], weights=[1, 1])], "cross_entropy")
    step = training.optim_step(ADAM)
    output = first.result(20)
    assert [np.round(one["logprobs"].data, 6).tolist() for one in output.loss_fn_outputs] == [
        [-0.02, -0.03, -0.04],
        [-0.06],
    ]
    assert math.isclose(output.metrics["loss:sum"], 0.03 + 0.5 * 0.04 - 2 * 0.06, abs_tol=1e-6)
    assert second.result(20).metrics["num_tokens:sum"] == 2
    worker.train_one()
    assert step.result(20).metrics["weight_version"] == worker.board.state.weight_version
    (request,) = worker.requests
    assert [(one.context_ids, one.continuation_ids, one.weights) for one in request.examples] == [
        ([1, 2], [3, 4], [1, 0.5]),  # what is before the first target that counts is context
        ([5], [6], [-2]),
        ([9], [10, 11], [1, 1]),
    ]
    options = request.options
    assert (options.loss, options.reduction, options.accumulate_steps) == ("cross_entropy", "sum", 3)
    assert (options.lr, options.beta1, options.beta2, options.eps) == (1e-4, 0.8, 0.95, 1e-9)
    assert options.on_duplicate == "train"


def test_the_next_step_has_nothing_of_the_one_before(training, worker):
    for tokens in ([1, 2], [3, 4]):
        training.forward_backward([datum(tokens, weights=[1])], "cross_entropy")
        step = training.optim_step(ADAM)
        worker.train_one()
        step.result(20)
    assert [[one.context_ids for one in request.examples] for request in worker.requests] == [[[1]], [[3]]]


def test_a_ratio_loss_as_rl_loop_sends_it_with_the_prompts_targets_at_zero(training, worker):
    one = datum([1, 2, 7, 8], logprobs=[0, -0.5, -0.25], advantages=[0, 1, 1])
    one.loss_fn_inputs["target_tokens"] = types.TensorData.from_numpy(np.array([0, 7, 8]))
    output = training.forward_backward(
        [one], "ppo", loss_fn_config={"clip_low_threshold": 0.7, "clip_high_threshold": 1.25}
    ).result(20)
    ratios = [math.exp(logprob(7) + 0.5), math.exp(logprob(8) + 0.25)]
    assert ratios[0] > 1.25
    assert math.isclose(output.metrics["loss:sum"], -(1.25 + ratios[1]), abs_tol=1e-5)
    assert output.loss_fn_outputs[0]["logprobs"].data[0] == 0.0
    step = training.optim_step(ADAM)
    worker.train_one()
    step.result(20)
    (example,), options = worker.requests[0].examples, worker.requests[0].options
    assert (example.context_ids, example.continuation_ids) == ([1, 2], [7, 8])
    assert (example.advantages, example.logprobs) == ([1, 1], [-0.5, -0.25])
    assert (options.loss, options.clip) == ("ppo", [0.3, 0.25])


def test_a_loss_of_the_clients_own_is_coefficients(training, worker):
    """forward_backward_custom: a forward pass, a gradient on the client's side, then cross entropy."""

    def loss(data, logprobs):
        return (logprobs[0] ** 2).sum(), {"own": 1.0}

    result = training.forward_backward_custom([datum([1, 2, 3], weights=[1, 1])], loss).result(20)
    assert result.metrics["own"] == 1.0
    step = training.optim_step(ADAM)
    worker.train_one()
    step.result(20)
    (example,) = worker.requests[0].examples  # the forward pass was none of the step
    assert example.weights == pytest.approx([-2 * logprob(2), -2 * logprob(3)])


def test_a_snapshot_samples_its_own_weights_alone(training, worker, asked):
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=5, seed=3, stop=["\n"], top_k=-1)
    said = sampler.sample(types.ModelInput.from_ints([1, 2]), 2, params).result(20)
    assert [(one.tokens, one.stop_reason) for one in said.sequences] == [([7, 8], "stop")] * 2
    assert said.sequences[0].logprobs == pytest.approx([-0.07, -0.08])
    assert said.sequences[0].sequence_id != said.sequences[1].sequence_id
    assert (asked[-1]["ignore_eos"], asked[-1]["stop"], asked[-1]["seed"]) == (True, ["\n"], 3)
    assert asked[-1]["repetition_penalty"] == 1.0  # whatever generation_config.json says
    first, *known = sampler.compute_logprobs(types.ModelInput.from_ints([1, 2, 3])).result(20)
    assert (first, known) == (None, pytest.approx([-0.02, -0.03]))
    inflight = training.save_weights_and_get_sampling_client(kind="inflight").result()
    worker.board.state.weight_version += 1
    with pytest.raises(tinker.RequestFailedError) as raised:
        sampler.sample(types.ModelInput.from_ints([1]), 1, params).result(20)
    assert "this sampler is of weights 0, and the one copy of the weights is at 1" in sentence(raised)
    assert inflight.sample(types.ModelInput.from_ints([1]), 1, params).result(20).sequences


def test_logprobs_that_do_not_follow_the_temperature_are_not_given(training):
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=5, temperature=0.5)
    said = sampler.sample(types.ModelInput.from_ints([1]), 1, params).result(20)
    assert said.sequences[0].logprobs is None


def test_weights_are_saved_by_a_sync_and_loaded_by_a_restore(service, training, worker, told, monkeypatch):
    pinned = []

    def pin(version):
        pinned.append(version)
        return PinResult("/m", version, None)

    monkeypatch.setattr(worker.server._answers, "_pin", pin)
    path = training.save_state("one").result(20).path
    assert path == f"tinker://{training.model_id}/weights/one"
    assert pinned == [3]
    worker.board.state.weight_version = 5
    training.load_state_with_optimizer(path).result(20)
    assert told[-1].weight_version == 3
    rest = service.create_rest_client()
    info = rest.get_weights_info_by_tinker_path(path).result(20)
    assert (info.base_model, info.is_lora) == ("m", False)
    assert rest.get_training_run_by_tinker_path(path).result(20).base_model == "m"
    assert fails(lambda: training.save_state("one")).startswith(f"{path} is there already")


def test_the_weights_of_a_runs_beginning_still_score_when_they_are_served_no_more(
    training, worker, asked, config, tmp_path, monkeypatch
):
    """As the recipe of DPO wants it. Read from hard links beside the model, by a process of its own; here one
    that gives each token its place."""
    model_dir = tmp_path / "m"
    model_dir.mkdir()
    (model_dir / "weights").write_text("as they were")
    monkeypatch.setattr("apollo_router.tinker.reference.snapshot", fake_snapshot(model_dir))
    share_weights(config, "boot")
    program = tmp_path / "apollo_worker" / "commands" / "logprobs.py"
    program.parent.mkdir(parents=True)
    for package in (program.parent, program.parent.parent):
        (package / "__init__.py").touch()
    program.write_text(
        "import json, sys\n"
        "assert open(sys.argv[1] + '/weights').read() == 'as they were'\n"
        "for line in sys.stdin: print([-i for i in range(1, len(json.loads(line)))], flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sampler = training.save_weights_and_get_sampling_client().result(20)
    prompt = types.ModelInput.from_ints([1, 2, 3])
    assert sampler.compute_logprobs(prompt).result(20)[1:] == pytest.approx([-0.02, -0.03])  # vLLM's
    worker.board.state.weight_version += 1
    assert sampler.compute_logprobs(prompt).result(20) == [None, -1, -2]
    params = types.SamplingParams(max_tokens=2)
    assert "this sampler is of weights 0" in fails(lambda: sampler.sample(prompt, 1, params))


def fake_snapshot(model_dir):
    @contextmanager
    def taken(_):
        held_by = os.open(model_dir, os.O_RDONLY)
        yield SimpleNamespace(path=model_dir, held_by=held_by, commit=SimpleNamespace(weight_version=0))
        os.close(held_by)

    return taken


# --- what dies, and what comes twice ---


@pytest.fixture
def http(server):
    with server.client(None) as http:
        http.headers["X-API-Key"] = f"tml-{TRAIN_KEY}"
        yield http


def test_a_step_that_is_sent_again_is_one_job(training, worker, http):
    training.forward_backward([datum([1, 2], weights=[1])], "cross_entropy").result(20)
    body = {"model_id": training.model_id, "seq_id": 2, "adam_params": {"learning_rate": 1e-4}}
    (request_id,) = {http.post(f"{PREFIX}/optim_step", json=body).json()["request_id"] for _ in range(3)}
    worker.train_one()
    wanted = {"request_id": request_id}
    one, two = (http.post(f"{PREFIX}/retrieve_future", json=wanted).json() for _ in range(2))
    assert one == two
    assert one["metrics"]["weight_version"] == 1
    assert len(worker.queue.list()) == 1


def test_a_future_outlives_the_worker_and_the_server(config):
    with FakeWorker(config) as worker, Server() as server:
        serve_completions(server)
        service = make_service(server)
        training = service.create_lora_training_client(base_model="m", rank=0).result()
        training.forward_backward([datum([1, 2], weights=[1])], "cross_entropy").result(20)
        training.optim_step(ADAM)
        wait_for(lambda: worker.queue.count("queued"))
    with TinkerStore(store_path(config)) as store:
        promised = store.next_waiting()
    assert promised.kind == "optim_step"
    with FakeWorker(config) as worker, Server() as server, server.client(None) as http:
        http.headers["X-API-Key"] = f"tml-{TRAIN_KEY}"
        worker.in_background(worker.train_one)
        answer = http.post(f"{PREFIX}/retrieve_future", json={"request_id": promised.id}).json()
        assert answer["metrics"]["weight_version"] == 1
        assert len(worker.queue.list()) == 1


def test_a_failed_forward_backward_fails_the_step_that_was_queued_behind_it(training, worker):
    bad = training.forward_backward([datum(list(range(50)), weights=[1] * 49)], "cross_entropy")
    good = training.forward_backward([datum([1, 2], weights=[1])], "cross_entropy")
    step = training.optim_step(ADAM)
    assert "vLLM refuses it: the prompt is too long" in fails(lambda: bad)
    good.result(20)
    assert fails(lambda: step).startswith("nothing was trained, since a forward_backward before it failed")
    training.forward_backward([datum([3, 4], weights=[1])], "cross_entropy")
    step = training.optim_step(ADAM)
    worker.train_one()
    step.result(20)
    assert [one.context_ids for one in worker.requests[0].examples] == [[3]]


def test_a_job_that_fails_fails_its_step(training, worker):
    training.forward_backward([datum([1, 2], weights=[1])], "cross_entropy")
    step = training.optim_step(ADAM)
    worker.train_one("failed", error="the loss is not finite")
    assert "failed: the loss is not finite" in fails(lambda: step)


# --- one owner ---


def test_the_weights_have_one_owner_until_it_finishes_or_its_lease_ends(server, worker, asked, config):
    with make_service(server) as first, make_service(server) as second:
        mine = first.create_lora_training_client(base_model="m", rank=0).result()
        message = fails(lambda: second.create_lora_training_client(base_model="m", rank=0))
        assert f"is being trained by {mine.model_id}" in message
        with TinkerStore(store_path(config)) as store, store.transaction() as db:
            db.execute("UPDATE sessions SET seen_at = seen_at - 100")
        second.create_lora_training_client(base_model="m", rank=0).result()
        assert "trains no longer" in fails(lambda: mine.optim_step(ADAM))
        second.close("success").result(20)
        first.create_lora_training_client(base_model="m", rank=0).result()


# --- what is refused ---


def fails(ask) -> str:
    """The sentence that the SDK's user reads."""
    with pytest.raises(tinker.TinkerError) as raised:
        ask().result(20)
    return str(raised.value).removeprefix("Request failed: ")


def test_lora_is_refused(service):
    message = fails(lambda: service.create_lora_training_client(base_model="m", rank=32))
    assert "has no LoRA: ask for rank 0" in message


def test_another_model_is_refused(service):
    message = fails(lambda: service.create_lora_training_client(base_model="n", rank=0))
    assert "this server has one model, m, not 'n'" in message


@pytest.mark.parametrize(
    ("loss", "inputs", "loss_config", "named"),
    [
        ("gspo", {}, None, "loss_fn 'gspo' is not served here"),
        ("cross_entropy", {"weights": [1, 1]}, {"beta": 1}, "takes no configuration, not beta"),
        ("cross_entropy", {"mask": [1, 1]}, None, "takes target_tokens, weights, not mask"),
        ("importance_sampling", {"advantages": [1, 1]}, None, "importance_sampling needs `logprobs`"),
        ("cross_entropy", {"weights": [1]}, None, "expected 2 finite numbers"),
        ("cross_entropy", {"weights": [1, math.nan]}, None, "expected 2 finite numbers"),
        ("cross_entropy", {"weights": [[1, 1], [1, 1]]}, None, "[T, K] and sparse targets are not served"),
        ("cross_entropy", {"target_tokens": [9, 3], "weights": [1, 1]}, None, "is the next token"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(training, loss, inputs, loss_config, named):
    one = datum([1, 2, 3], **inputs)
    assert named in fails(lambda: training.forward_backward([one], loss, loss_fn_config=loss_config))


@pytest.mark.parametrize(
    ("adam", "named"),
    [
        ({"grad_clip_norm": 1.0}, "grad_clip_norm is not served"),
        ({"learning_rate": 0.0}, "options.lr"),
        ({"learning_rate": 1e-4, "beta1": 1.0}, "options.beta1"),
    ],
)
def test_a_step_with_what_apollo_has_not_is_refused_and_its_batch_is_gone(training, adam, named):
    training.forward_backward([datum([1, 2], weights=[1])], "cross_entropy").result(20)
    assert named in fails(lambda: training.optim_step(types.AdamParams(**{"learning_rate": 1e-4, **adam})))
    assert "and there is none" in fails(lambda: training.optim_step(ADAM))


def test_two_losses_in_one_step_are_refused(training):
    training.forward_backward([datum([1, 2], weights=[1])], "cross_entropy")
    training.forward_backward([datum([1, 2], logprobs=[-1], advantages=[1])], "importance_sampling")
    assert "have one loss and one configuration" in fails(lambda: training.optim_step(ADAM))


def test_weights_without_their_optimizer_are_not_loaded(training):
    assert "loaded with their optimizer's state" in fails(lambda: training.load_state("tinker://a/weights/b"))


def test_what_nobody_saved_is_not_loaded(training):
    message = fails(lambda: training.load_state_with_optimizer("tinker://a/weights/b"))
    assert "nothing was saved as" in message


@pytest.mark.parametrize(
    ("key", "status"), [(None, 401), ("tml-another", 403), (TRAIN_KEY, 403), ("tml-" + TRAIN_KEY, 200)]
)
def test_only_the_train_key_opens(server, key, status):
    with server.client(None) as http:
        headers = {} if key is None else {"X-API-Key": key}
        assert http.get(f"{PREFIX}/healthz", headers=headers).status_code == status


def test_a_field_that_asks_for_something_unknown_is_refused_and_an_empty_one_is_not(http, training):
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
    sampler = training.save_weights_and_get_sampling_client().result()
    body = {
        "prompt": prompt, "sampling_params": {}, "seq_id": 1,
        "sampling_session_id": sampler._sampling_session_id, "record_stability_info": False,
    }  # fmt: skip
    assert http.post(f"{PREFIX}/asample", json=body).status_code == 200
    answer = http.post(f"{PREFIX}/asample", json=body | {"record_stability_info": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("`record_stability_info` is not served here")


def test_what_is_no_route_and_what_is_no_protobuf(http, worker):
    assert http.post(f"{PREFIX}/copy_weights", json={}).json()["error"]["code"] == "not_served"
    proto = {"Content-Type": "application/x-protobuf"}
    answer = http.post(f"{PREFIX}/forward_backward", content=b"\xff\xff\xff", headers=proto)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_protobuf")
    assert http.post(f"{PREFIX}/retrieve_future", json={"request_id": "req-0"}).status_code == 410
