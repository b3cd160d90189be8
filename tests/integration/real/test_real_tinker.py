"""Tinker's own client on the real model: it learns, is sampled, scores, and outlives a killed worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live_server import Live, wait_for

tinker = pytest.importorskip("tinker", reason="the extra `tinker` is not installed")

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUESTION, ANSWER = "Where does the harbour pilot live?", "The harbour pilot lives at Quay Nine."


@pytest.fixture
def service(live: Live) -> Iterator[Any]:
    url, key = f"{live.server.url}/train/tinker", f"tml-{live.key}"
    with tinker.ServiceClient(base_url=url, api_key=key) as service:
        yield service


def test_a_run_of_tinkers_client(live: Live, service: Any) -> None:
    types = tinker.types
    training = service.create_lora_training_client(base_model=live.server.model_name, rank=0).result()
    context = rendered(live, QUESTION)
    *target, eos = tokens_of(live, ANSWER + "<|im_end|>")
    target.append(eos)
    tokens = [*context, *target]
    weights = [0.0] * (len(context) - 1) + [1 / len(target)] * len(target)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
            "weights": types.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
        },
    )
    beginning = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(tokens)
    before = beginning.compute_logprobs(prompt).result()

    losses: list[tuple[float, float]] = []
    for step in range(6):
        forward = training.forward_backward([datum], "cross_entropy")
        optim = training.optim_step(types.AdamParams(learning_rate=1e-4))
        if step == 2:  # the worker dies with the step queued or half done; the client sees nothing of it
            forward.result()
            live.kill_worker()
            live.start_worker()
        losses.append((forward.result().metrics["loss:sum"], optim.result().metrics["loss:sum"]))
    # vLLM's forward pass and the trainer's, of the same bf16 weights: some 1e-2 of a nat a token apart.
    assert [of_vllm for of_vllm, _ in losses] == pytest.approx([own for _, own in losses], abs=0.05)
    assert losses[-1][0] < losses[0][0] / 4
    jobs = live.get("/train/jobs?limit=6").json()["data"]
    assert [job["steps_done"] for job in jobs] == [1] * 6

    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=24, temperature=0, stop=[eos])
    said = sampler.sample(types.ModelInput.from_ints(context), 1, params).result()
    assert said.sequences[0].tokens == target
    with pytest.raises(tinker.RequestFailedError, match="this sampler is of weights"):
        beginning.sample(types.ModelInput.from_ints(context), 1, params).result()
    # Read from the disk by transformers, what vLLM said of the same weights before: logits of 16 to 32 have a
    # spacing of 0.125 in bf16, on both sides. What was learned is another matter.
    again, after = (one.compute_logprobs(prompt).result() for one in (beginning, sampler))
    learned = slice(-len(target), None)
    assert mean_distance(again[1:], before[1:]) < 0.125
    assert mean_distance(after[learned], before[learned]) > 1

    path = training.save_state("after").result().path
    training.load_state_with_optimizer(path).result()
    wait_for(
        lambda: live.status()["durable_version"] == live.status()["weight_version"], "the save is durable"
    )


def rendered(live: Live, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    body = {"model": live.server.model_name, "messages": messages, "add_generation_prompt": True}
    return live.post("/tokenize", body).json()["tokens"]


def tokens_of(live: Live, text: str) -> list[int]:
    return live.post("/tokenize", {"model": live.server.model_name, "prompt": text}).json()["tokens"]


def mean_distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
