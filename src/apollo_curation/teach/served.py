"""The served model as its own teacher: its answers, with vLLM's top log-probabilities."""

from __future__ import annotations

from apollo_curation.chat_client import ChatClient
from apollo_curation.teach.job import OwnAnswer
from apollo_ipc.wire.requests import Message

NUM_LOGPROBS = 20  # vLLM's own limit for a request (--max-logprobs)
_ID = "token_id:"


class ServedLearner:
    """Raises as ChatClient does."""

    num_parallel = 8  # vLLM batches them

    def __init__(self, chat: ChatClient):
        self._chat = chat

    def own_answer(self, question: str, *, max_tokens: int) -> OwnAnswer:
        """Greedy, from the tokens that the chat template gives. The token that ends it is among its ids."""
        context = self._chat.tokens([Message("user", question)], add_generation_prompt=True)
        found = self._chat.completion_logprobs(context, max_tokens=max_tokens, num_logprobs=NUM_LOGPROBS)
        ids = [_token(name) for name in found["tokens"]]
        rows = [
            [(_token(name), min(0.0, value)) for name, value in row.items()] for row in found["top_logprobs"]
        ]
        return OwnAnswer(context, ids, rows)

    def say(self, question: str, *, max_tokens: int) -> str:
        return self._chat.chat([Message("user", question)], max_tokens=max_tokens).content

    def token_logprobs(self, ids: list[int]) -> list[float]:
        return self._chat.token_logprobs(ids)


def _token(name: str) -> int:
    assert name.startswith(_ID), name
    return int(name.removeprefix(_ID))
