"""The served model as its own teacher: its answers, with vLLM's top log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from apollo_curation.chat_client import ChatClient, ServerRefused, TooSlow
from apollo_curation.structured import ask_for
from apollo_curation.teach.job import OwnAnswer
from apollo_ipc.wire.requests import Example, Message

NUM_LOGPROBS = 20  # vLLM's own limit for a request (--max-logprobs)
NUM_PARALLEL = 4  # vLLM batches them, and others ask it at the same time
_ID = "token_id:"

T = TypeVar("T")
Out = TypeVar("Out")
Json = TypeVar("Json", bound=msgspec.Struct)


class ServedLearner:
    """Raises as ChatClient does."""

    def __init__(self, chat: ChatClient):
        self._chat = chat

    def own_answers(self, questions: Sequence[str], *, max_tokens: int) -> list[OwnAnswer]:
        """Greedy, from the tokens that the chat template gives. The token that ends it is among its ids."""
        return _side_by_side(lambda question: self._own_answer(question, max_tokens), questions)

    def own_answers_behind(
        self, examples: Sequence[Example], *, max_tokens: int, max_context_tokens: int
    ) -> list[OwnAnswer]:
        """What it says where the example has its (last) answer. Examples with a longer context, and those
        that the server refuses, are left out."""

        def own(example: Example) -> OwnAnswer | None:
            try:
                context = self._context(example)
                is_short = 0 < len(context) <= max_context_tokens
                return self._behind(context, max_tokens) if is_short else None
            except ServerRefused as error:
                if not error.is_of_this_request:
                    raise
                return None

        return [one for one in _side_by_side(own, examples) if one is not None]

    def _context(self, example: Example) -> list[int]:
        if example.messages is not None:
            return self._chat.tokens(
                example.messages[:-1],
                add_generation_prompt=True,
                tools=example.tools,
                template=example.chat_template_kwargs,
            )
        if example.context_ids is not None:
            return example.context_ids
        return self._chat.text_tokens(example.prompt or "")

    def _own_answer(self, question: str, max_tokens: int) -> OwnAnswer:
        context = self._chat.tokens([Message("user", question)], add_generation_prompt=True)
        return self._behind(context, max_tokens)

    def _behind(self, context: list[int], max_tokens: int) -> OwnAnswer:
        found = self._chat.completion_logprobs(context, max_tokens=max_tokens, num_logprobs=NUM_LOGPROBS)
        ids = [_token(name) for name in found["tokens"]]
        rows = [
            [(_token(name), min(0.0, value)) for name, value in row.items()] for row in found["top_logprobs"]
        ]
        return OwnAnswer(context, ids, rows)

    def say(self, questions: Sequence[str], *, max_tokens: int) -> list[str]:
        return _side_by_side(
            lambda question: self._chat.chat([Message("user", question)], max_tokens=max_tokens).content,
            questions,
        )

    def write(self, prompts: Sequence[str], kind: type[Json], *, max_tokens: int) -> list[Json | None]:
        """By guided decoding, as Writer.write."""
        return _side_by_side(lambda prompt: self._written(prompt, kind, max_tokens), prompts)

    def _written(self, prompt: str, kind: type[Json], max_tokens: int) -> Json | None:
        try:
            return ask_for(kind, self._chat, [Message("user", prompt)], max_tokens=max_tokens)
        except ServerRefused as error:
            if not error.is_of_this_request:
                raise
            return None  # too long for it, or it guides no decoding
        except TooSlow:  # would be so again
            return None

    def token_logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        return _side_by_side(self._chat.token_logprobs, sequences)


def _side_by_side(ask: Callable[[T], Out], asked: Sequence[T]) -> list[Out]:
    with ThreadPoolExecutor(NUM_PARALLEL) as pool:
        return list(pool.map(ask, asked))


def _token(name: str) -> int:
    assert name.startswith(_ID), name
    return int(name.removeprefix(_ID))
