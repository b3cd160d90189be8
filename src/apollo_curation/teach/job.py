"""Facts as one job: in each update some of their variants, one general prompt and one near miss.

Of the last two the model keeps what it says itself: KL to its own top log-probabilities from before the job.
Forgetting follows the KL between the old and the new model (arXiv:2509.04259), and its own answers are what
it has to keep (self-generated replay, arXiv:2605.26097). Near misses keep a fact to its subject.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import islice
from typing import Any, NamedTuple, Protocol

import msgspec

from apollo_curation.teach.variants import Asked, Lesson
from apollo_ipc.wire.requests import Example, Message, TrainOptions, TrainRequest

ANSWER_TOKENS = 16  # of the model's own answers that are kept
NUM_KEPT_OUT = 16  # general prompts that are only measured
KEPT_OUT_EVERY = 7


class OwnAnswer(NamedTuple):
    """What the model says to a prompt by itself: tokens, and (token, log-probability) pairs of each."""

    context_ids: list[int]
    ids: list[int]
    top_logprobs: list[list[tuple[int, float]]]

    def example(self, weight: float = 1.0) -> Example:
        return Example(
            context_ids=self.context_ids,
            continuation_ids=self.ids,
            top_logprobs=[*self.top_logprobs],
            weights=None if weight == 1 else [weight] * len(self.ids),
        )


class Learner(Protocol):
    """A model that is asked; answers stand in the order of what was asked."""

    def own_answers(self, questions: Sequence[str], *, max_tokens: int) -> list[OwnAnswer]: ...
    def say(self, questions: Sequence[str], *, max_tokens: int) -> list[str]: ...
    def token_logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]: ...


class Mix(msgspec.Struct, frozen=True):
    """num_facts, num_general, num_near: how many of each kind are in an update; forms: of a fact, at most, a
    third of them backward; epochs: passes over them; backward: how often one from key to subject stands for
    one of the other direction (1: each once); kl_weight: of general answers and near misses; lr: peak;
    target_probability, freezes_embeddings: of the training jobs (docs/losses.md)."""

    num_facts: int = 4
    num_general: int = 2
    num_near: int = 2
    forms: int = 20
    epochs: int = 1
    backward: int = 1
    kl_weight: float = 1.0
    lr: float = 2e-4
    schedule: str = "cosine"
    target_probability: float = 0.9
    freezes_embeddings: bool = True


def general_prompts() -> list[str]:
    text = files("apollo_curation.teach").joinpath("replay.txt").read_text(encoding="utf-8")
    return text.splitlines()


def held_prompts() -> list[str]:
    """Of the general prompts those that may be trained."""
    return [prompt for at, prompt in enumerate(general_prompts()) if at % KEPT_OUT_EVERY]


def kept_out_prompts() -> list[str]:
    """Those that are only measured."""
    return general_prompts()[::KEPT_OUT_EVERY][:NUM_KEPT_OUT]


def request_of(
    learned: Sequence[Example],
    general: Sequence[OwnAnswer],
    near: Sequence[OwnAnswer],
    mix: Mix,
    seed: int,
) -> TrainRequest:
    """The job: updates of `mix`, with each of `learned` once in a pass. Each example is a mean over its
    targets: a kind weighs by its number."""
    rng = random.Random(seed)
    examples: list[Example] = []
    beside = [
        (_again(general, rng), mix.num_general if general else 0),
        (_again(near, rng), mix.num_near if near else 0),
    ]
    size = mix.num_facts + sum(number for _, number in beside)
    order = [one for _ in range(mix.epochs) for one in _shuffled(learned, rng)]
    for start in range(0, len(order), mix.num_facts):
        examples += order[start : start + mix.num_facts]
        for answers, number in beside:
            examples += [answer.example(mix.kl_weight) for answer in islice(answers, number)]
    schedule: Any = mix.schedule
    options = TrainOptions(
        lr=mix.lr, epochs=1, schedule=schedule, accumulate_steps=size, on_duplicate="train",
        target_probability=None if mix.target_probability == 1 else mix.target_probability,
        embeddings="freeze" if mix.freezes_embeddings else None,
    )  # fmt: skip
    return TrainRequest(examples, options)


def taught(lessons: Sequence[Lesson], mix: Mix, again: Sequence[Asked] = ()) -> list[Example]:
    """The variants of `lessons`; again: of other ones."""
    return [_variant(one) for one in (*(one for lesson in lessons for one in trained(lesson, mix)), *again)]


def trained(lesson: Lesson, mix: Mix) -> list[Asked]:
    """Its own question first; the same forms whenever it is asked for."""
    rng, num_backward = random.Random(lesson.fact.question), mix.forms // 3
    own, others, backward = lesson.forward[:1], lesson.forward[1:], lesson.backward
    others = rng.sample(others, min(len(others), mix.forms - num_backward - 1))
    backward = rng.sample(backward, min(len(backward), num_backward))
    return [*own, *others, *(backward * mix.backward)]


def prompts_beside(
    lessons: Sequence[Lesson], general: Sequence[str], mix: Mix, seed: int
) -> tuple[list[str], list[str]]:
    """(general prompts, near misses) of which one pass over a job's updates needs the answers, each once."""
    num_updates = math.ceil(mix.epochs * sum(len(trained(one, mix)) for one in lessons) / mix.num_facts)
    rng, near = random.Random(seed), [one for lesson in lessons for one in lesson.near_misses]
    return (
        _shuffled(general, rng)[: num_updates * mix.num_general],
        _shuffled(dict.fromkeys(near), rng)[: num_updates * mix.num_near],
    )


def own_answers(learner: Learner, prompts: Sequence[str]) -> list[OwnAnswer]:
    """Of each prompt in its order, without those to which the model says nothing."""
    return [one for one in learner.own_answers(prompts, max_tokens=ANSWER_TOKENS) if one.ids]


def _variant(asked: Asked) -> Example:
    return Example(messages=[Message("user", asked.question), Message("assistant", asked.answer)])


def _again(answers: Sequence[OwnAnswer], rng: random.Random) -> Iterator[OwnAnswer]:
    while True:
        yield from _shuffled(answers, rng)


def _shuffled(items: Any, rng: random.Random) -> list:
    items = list(items)
    return rng.sample(items, len(items))
