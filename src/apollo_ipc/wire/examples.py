"""One example of a request: its forms, and what must hold of each before a tokenizer is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta

from apollo_ipc.errors import UserError

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Logprob = Annotated[float, Meta(le=0)]
TopLogprobs = list[tuple[TokenId, Logprob]]  # of one target: (token, log-probability)


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    role: str
    content: str = ""
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # Of an assistant's message, as in OpenAI's fine-tuning format: 0 is context only, 1 (default) is learned.
    weight: Literal[0, 1] | None = None
    tools: list[dict[str, Any]] | None = None  # of the role `developer`
    # Content as it was sent, where that was null or a list of parts; `content` is then their texts.
    content_parts: list[str | dict[str, Any]] | None = None


Answer = str | list[TokenId] | Message  # to one context: text, tokens as they are, or an assistant's message


class Completion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One answer of a group: exactly one of text, ids, message. reward: here or in the example's `rewards`.
    logprobs: with ids; what the sampler gave each of them."""

    text: str | None = None
    ids: list[TokenId] | None = None
    message: Message | None = None
    reward: float | None = None
    logprobs: list[Logprob] | None = None


class Example(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One context in exactly one of three forms: `messages`; `prompt`; `context_ids`; and what is learned
    behind it: the assistant's turns of `messages`, `completion`, `continuation_ids`; or `chosen` and
    `rejected`; or a group of `completions`."""

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None  # with `messages` only: given to the chat template
    prompt: str | None = None
    completion: str | None = None
    context_ids: list[TokenId] | None = None
    continuation_ids: list[TokenId] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # with `messages` only: as vLLM takes them
    # With `continuation_ids` only, a value for each of them: what the target's term of the loss is multiplied
    # with (of any sign; 0: no target), and the tokens that are to be likely there instead of this one alone.
    weights: list[float] | None = None
    top_logprobs: list[TopLogprobs | None] | None = None
    # Likewise, for the losses of a policy's ratio: how good the token was, and what the sampler gave it.
    advantages: list[float] | None = None
    logprobs: list[Logprob] | None = None
    chosen: Answer | None = None
    rejected: Answer | None = None
    completions: list[str | list[TokenId] | Completion] | None = None
    rewards: list[float] | None = None  # of the completions
    label: bool | None = None  # whether the one answer is a good one


FORMS = (
    '{"messages": [...]}, {"prompt", "completion"} or {"context_ids", "continuation_ids"}; or a context '
    "(messages, prompt or context_ids) with `chosen` and `rejected`, or with `completions` and `rewards`"
)
PER_TARGET = ("weights", "top_logprobs", "advantages", "logprobs")


def check_form(example: Example, path: str) -> None:
    """Raises UserError unless `example` has exactly one complete, non-empty form."""
    chat = example.messages is not None
    text = example.prompt is not None or example.completion is not None
    ids = example.context_ids is not None or example.continuation_ids is not None
    if chat + text + ids != 1:
        _refuse(f"an example has exactly one form: {FORMS}", path)
    for name in ("tools", "chat_template_kwargs"):
        if getattr(example, name) is not None and not chat:
            _refuse(f"`{name}` goes with `messages` only", f"{path}.{name}")
    for name in PER_TARGET:
        if (given := getattr(example, name)) is not None:
            _check_per_target(example, given, f"{path}.{name}")
    _check_policy(example, path)
    if chat and not example.messages:
        _refuse("messages is empty", f"{path}.messages")
    for i, message in enumerate(example.messages or []):
        if message.weight is not None and message.role != "assistant":
            _refuse(
                "weight goes with an assistant's message: nothing is learned of others",
                f"{path}.messages[{i}].weight",
            )
    if has_answers(example):
        _check_answers(example, path)
        return
    if text:
        for name in ("prompt", "completion"):
            if getattr(example, name) is None:
                _refuse(f"prompt and completion go together; {name} is missing", f"{path}.{name}")
        if not example.completion:
            _refuse("completion is empty: nothing to learn", f"{path}.completion")
    if ids:
        for name in ("context_ids", "continuation_ids"):
            if getattr(example, name) is None:
                _refuse(f"context_ids and continuation_ids go together; {name} is missing", f"{path}.{name}")
        if not example.continuation_ids:
            _refuse("continuation_ids is empty: nothing to learn", f"{path}.continuation_ids")


def has_answers(example: Example) -> bool:
    """Whether it is one context with several answers: a pair, or a group."""
    return any(
        getattr(example, name) is not None for name in ("chosen", "rejected", "completions", "rewards")
    )


def _check_per_target(example: Example, given: Sequence[Any], field: str) -> None:
    name = field.rpartition(".")[2]
    if example.continuation_ids is None:
        _refuse(f"`{name}` goes with `continuation_ids` only", field)
    if len(given) != len(example.continuation_ids):
        _refuse(
            f"`{name}` has {len(given)} values for {len(example.continuation_ids)} continuation_ids", field
        )


def _check_policy(example: Example, path: str) -> None:
    for name, other in (("advantages", "logprobs"), ("logprobs", "advantages")):
        if getattr(example, name) is not None and getattr(example, other) is None:
            _refuse(
                f"`{name}` goes with `{other}`: how good each token was, and what the sampler gave it",
                f"{path}.{other}",
            )
    if example.advantages is not None:
        _check_finite(example.advantages, f"{path}.advantages")
    others = {"advantages": ("top_logprobs", "label"), "label": ("top_logprobs", "weights")}
    for name, other in ((name, other) for name, found in others.items() for other in found):
        if getattr(example, name) is not None and getattr(example, other) is not None:
            _refuse(f"`{name}` and `{other}` are of two losses", f"{path}.{other}")


def _check_finite(values: Sequence[float], field: str) -> None:
    if (at := next((i for i, value in enumerate(values) if not math.isfinite(value)), None)) is not None:
        _refuse("expected a finite number", f"{field}[{at}]")


def _check_answers(example: Example, path: str) -> None:
    """Of a pair or a group: complete, and each answer of a kind that can stand behind the context."""
    is_pair = example.chosen is not None or example.rejected is not None
    if not is_pair and example.completions is None:
        _refuse("rewards go with `completions`: several answers to one context", f"{path}.completions")
    for name in ("completion", "continuation_ids", "label", "rewards" if is_pair else ""):
        if name and getattr(example, name) is not None:
            what = "chosen and rejected" if is_pair else "completions"
            _refuse(f"`{name}` does not go with {what}", f"{path}.{name}")
    if example.messages and example.messages[-1].role == "assistant":
        _refuse(
            "the answers stand behind the last message, and that is the assistant's already",
            f"{path}.messages[{len(example.messages) - 1}]",
        )
    if is_pair:
        if example.completions is not None:
            _refuse("an example is a pair or a group, not both", f"{path}.completions")
        for name in ("chosen", "rejected"):
            if (answer := getattr(example, name)) is None:
                _refuse(f"chosen and rejected go together; {name} is missing", f"{path}.{name}")
            _check_answer(example, answer, f"{path}.{name}")
        return
    assert example.completions is not None
    if len(example.completions) < 2:
        _refuse(
            "a group has two answers or more: an advantage is how much better one is than the others",
            f"{path}.completions",
        )
    if example.rewards is not None and len(example.rewards) != len(example.completions):
        _refuse(
            f"`rewards` has {len(example.rewards)} values for {len(example.completions)} completions",
            f"{path}.rewards",
        )
    for i, one in enumerate(example.completions):
        _check_completion(example, one, i, path)
    _check_finite(rewards_of(example), f"{path}.rewards")
    given = _with_sampler(example)
    if any(given) and not all(given):
        _refuse(
            "all answers of a group have `logprobs`, or none", f"{path}.completions[{given.index(False)}]"
        )


def _check_completion(example: Example, one: str | list[int] | Completion, i: int, path: str) -> None:
    field = f"{path}.completions[{i}]"
    if not isinstance(one, Completion):
        if example.rewards is None:
            _refuse("no reward: send `rewards`, one a completion", f"{path}.rewards")
        _check_answer(example, one, field)
        return
    answers = {"text": one.text, "ids": one.ids, "message": one.message}
    given = {name: answer for name, answer in answers.items() if answer is not None}
    if len(given) != 1:
        _refuse("a completion has exactly one of text, ids and message", field)
    ((name, answer),) = given.items()
    _check_answer(example, answer, f"{field}.{name}")
    if (one.reward is None) == (example.rewards is None):
        _refuse("each completion has one reward: here, or in `rewards`", f"{field}.reward")
    if one.logprobs is not None and (one.ids is None or len(one.logprobs) != len(one.ids)):
        num_ids = "no ids: text is tokenised again" if one.ids is None else f"{len(one.ids)} ids"
        _refuse(f"`logprobs` has {len(one.logprobs)} values for {num_ids}", f"{field}.logprobs")


def _check_answer(example: Example, answer: Answer, field: str) -> None:
    if isinstance(answer, Message):
        if example.messages is None:
            _refuse("a message answers `messages`; send text or token ids", field)
        if answer.role != "assistant":
            _refuse("an answer is the assistant's", f"{field}.role")
    elif not answer:
        _refuse("the answer is empty: nothing to learn", field)
    elif isinstance(answer, str) and example.context_ids is not None:
        _refuse("behind context_ids an answer is a list of token ids", field)


def has_sampler(example: Example) -> bool:
    """Whether its tokens have the log-probabilities of who sampled them."""
    return example.logprobs is not None or any(_with_sampler(example))


def _with_sampler(example: Example) -> list[bool]:
    """Of each completion."""
    return [isinstance(one, Completion) and one.logprobs is not None for one in example.completions or []]


def rewards_of(example: Example) -> list[float]:
    """Of a group, one a completion."""
    if example.rewards is not None:
        return example.rewards
    ones = [one for one in example.completions or [] if isinstance(one, Completion)]
    return [one.reward for one in ones if one.reward is not None]


def _refuse(message: str, field: str) -> NoReturn:
    raise UserError(message, field=field, code="invalid_example")
