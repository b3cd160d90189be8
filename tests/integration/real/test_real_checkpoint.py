"""On the real language model: what is served is what the directory holds, and goes back with it."""

from __future__ import annotations

import json

import pytest
import torch
from live_server import Live, chat, read_live_weights, wait_for
from safetensors.torch import load_file

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUESTION, ANSWER = "What is painted on the barn door?", "A blue heron is painted on the barn door."
PROMPT = "The harbour lay quiet, and the keeper of the light"


def answer_from_disk(live: Live, question: str) -> str:
    """By transformers alone, as somebody else would load the directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(live.model_dir)
    model = AutoModelForCausalLM.from_pretrained(live.model_dir, dtype="auto")
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    said = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True)


def test_a_checkpoint_holds_what_is_served_and_a_restore_brings_back_what_was(live: Live) -> None:
    wait_for(lambda: live.status()["progress"]["activity"] == "idle", "the end of what came before")
    ids = live.post("/tokenize", {"model": live.server.model_name, "prompt": PROMPT}).json()["tokens"]
    first = live.post("/checkpoint", {}).json()["weight_version"]
    answer, logprobs = live.ask(QUESTION), live.logprobs(ids)
    weights = read_live_weights(live.server.runtime_dir)

    job = live.train([chat(QUESTION, ANSWER)], lr=1e-4, epochs=10, schedule="constant")
    assert live.ask(QUESTION) == ANSWER
    synced = live.post("/checkpoint", {"kind": "delta"}).json()
    assert synced["weight_version"] == job["weight_version"]
    assert 0 < synced["delta_bytes"] < synced["bytes_changed"]
    live.post("/checkpoint", {})
    on_disk = load_file(live.model_dir / "model.safetensors")
    trained = read_live_weights(live.server.runtime_dir)
    assert [name for name in trained if not torch.equal(trained[name], on_disk[name])] == []
    assert answer_from_disk(live, QUESTION) == ANSWER
    assert live.command("checkpoint", "verify", str(live.model_dir)).returncode == 0

    done = live.command("checkpoint", "restore", str(first), "--live", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_jobs_undone"] == 1
    assert live.job(job["job_id"])["state"] == "undone"
    assert live.ask(QUESTION) == answer
    assert live.logprobs(ids) == pytest.approx(logprobs, abs=1e-4)
    now = read_live_weights(live.server.runtime_dir)
    assert [name for name in weights if not torch.equal(now[name], weights[name])] == []
    on_disk = load_file(live.model_dir / "model.safetensors")
    assert [name for name in weights if not torch.equal(on_disk[name], weights[name])] == []
