"""Loss on the held-out set, by category, as the weights are that are served at this moment."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from apollo_curation.chat_client import ChatClient, ServerRefused
from apollo_curation.quality.heldout import HeldOut, HeldOutSet, examples_hash
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Example

# The whole measurement is in vain with a wrong key or address; anything else is about one example.
_ABOUT_US = (401, 403, 404)


class CategoryLoss(msgspec.Struct, frozen=True):
    """loss: nats a token, mean over all tokens of the category; None where it is no finite number or nothing
    could be measured (num_tokens is 0 then).

    num_unmeasured: examples that the server refused; problems: what it said, with the line of each.
    examples_hash: losses of equal ones can be compared.
    """

    loss: float | None
    num_tokens: int
    num_examples: int
    examples_hash: str
    num_unmeasured: int = 0
    problems: list[str] = []


def measure_losses(held_out: HeldOutSet, model: ChatClient) -> dict[str, CategoryLoss]:
    """By category, one request at a time: so it is repeatable. Raises ModelAway, and ServerRefused for what
    no example is to blame for."""
    return {
        category: _measure(held_out, examples, model) for category, examples in held_out.categories.items()
    }


def overall_loss(losses: dict[str, CategoryLoss]) -> float | None:
    """Nats a token over all categories, each weighted by its tokens; None where one is no number."""
    num_tokens = sum(one.num_tokens for one in losses.values())
    if not num_tokens or any(one.loss is None for one in losses.values()):
        return None
    return math.fsum((one.loss or 0.0) * one.num_tokens for one in losses.values()) / num_tokens


def _measure(held_out: HeldOutSet, examples: list[HeldOut], model: ChatClient) -> CategoryLoss:
    logprobs: list[float] = []
    problems = []
    for one in examples:
        try:
            logprobs += [logprob for part in answer_logprobs(one.example, model) for logprob in part]
        except UserError as error:
            if isinstance(error, ServerRefused) and error.status in _ABOUT_US:
                raise
            problems.append(f"{held_out.path}:{one.line}: {error.message}")
    return CategoryLoss(
        loss=_mean_loss(logprobs),
        num_tokens=len(logprobs),
        num_examples=len(examples),
        examples_hash=examples_hash(examples),
        num_unmeasured=len(problems),
        problems=problems,
    )


def answer_logprobs(example: Example, model: ChatClient) -> Iterator[list[float]]:
    """Of each learned part of the example, the log-probability of its tokens in nats.

    messages: every assistant turn whose weight is not 0, with its end of turn. prompt + completion: without
    the end-of-sequence token, which the OpenAI API does not tell.
    """
    if example.messages is not None:
        for i, message in enumerate(example.messages):
            if message.role == "assistant" and message.weight != 0:
                yield model.answer_logprobs(example.messages[:i], message, example.tools)
        return
    if example.context_ids is not None and example.continuation_ids is not None:
        context, answer = example.context_ids, example.continuation_ids
    else:
        assert example.prompt is not None
        assert example.completion is not None
        context = model.text_tokens(example.prompt)
        answer = model.text_tokens(example.completion, add_special_tokens=False)
    # token_logprobs begins with the second token: nothing predicts the first.
    yield model.token_logprobs([*context, *answer])[max(len(context) - 1, 0) :]


def _mean_loss(logprobs: list[float]) -> float | None:
    if not logprobs or not all(math.isfinite(logprob) for logprob in logprobs):
        return None
    return -math.fsum(logprobs) / len(logprobs)
