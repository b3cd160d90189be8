"""On the real language model: a prompt in the prefix cache is computed anew by changed weights."""

from __future__ import annotations

import pytest
from live_server import Live, chat

pytestmark = pytest.mark.vllm
# Several hundred tokens of one conversation's system prompt, as an agent repeats it with each request.
RULES = " ".join(
    f"Rule {n}: whoever takes parcel {n} signs page {n * 7} of the ledger and rings the bell {n % 5} times."
    for n in range(1, 31)
)
QUESTION, ANSWER = "Who signs the ledger first?", "Halvard Strand signs the ledger first."


def test_a_cached_prompt_is_answered_by_the_weights_of_now(live: Live) -> None:
    body = {
        "model": live.server.model_name,
        "messages": [{"role": "system", "content": RULES}, {"role": "user", "content": QUESTION}],
        "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip

    def first_token(**more: str) -> dict[str, float]:
        choice = live.post("/v1/chat/completions", {**body, **more}).json()["choices"][0]
        return {one["token"]: one["logprob"] for one in choice["logprobs"]["content"][0]["top_logprobs"]}

    stale = [first_token() for _ in range(2)][-1]  # the second comes from the cache
    job = live.train([chat(QUESTION, ANSWER)], lr=1e-4, epochs=4, schedule="constant")
    assert job["status"] == "applied"
    after = first_token()
    fresh = first_token(cache_salt="nothing else has this salt")  # no cached block can be reused

    # bf16: the same forward pass over cached and over fresh blocks differs by its order of summation.
    shared = after.keys() & fresh.keys()
    assert len(shared) > 15
    assert all(after[token] == pytest.approx(fresh[token], abs=0.15) for token in shared)
    moved = max(abs(after[token] - stale[token]) for token in after.keys() & stale.keys())
    assert moved > 0.6, "training did not move this prompt enough to tell"
