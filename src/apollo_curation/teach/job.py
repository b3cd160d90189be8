"""Facts as one job: in each update some of their variants, one general prompt and one near miss.

Of the last two the model keeps what it says itself: KL to its own top log-probabilities from before the job.
Forgetting follows the KL between the old and the new model (arXiv:2509.04259), and its own answers are what
it has to keep (self-generated replay, arXiv:2605.26097). Near misses keep a fact to its subject.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from itertools import cycle, islice
from typing import NamedTuple, Protocol

from apollo_curation.teach.facts import Lesson
from apollo_ipc.wire.requests import Example, Message, TrainOptions, TrainRequest

ANSWER_TOKENS = 48  # of the model's own answers that are kept


class OwnAnswer(NamedTuple):
    """What the model says to a prompt by itself: tokens, and (token, log-probability) pairs of each."""

    context_ids: list[int]
    ids: list[int]
    top_logprobs: list[list[tuple[int, float]]]

    def example(self) -> Example:
        return Example(
            context_ids=self.context_ids, continuation_ids=self.ids, top_logprobs=[*self.top_logprobs]
        )


class Learner(Protocol):
    """A model that is asked; `num_parallel` questions at a time are answered soonest."""

    num_parallel: int

    def own_answer(self, question: str, *, max_tokens: int) -> OwnAnswer: ...
    def say(self, question: str, *, max_tokens: int) -> str: ...
    def token_logprobs(self, ids: list[int]) -> list[float]: ...


class Mix(NamedTuple):
    """How many of each kind are in an update, and for how many passes over the variants; lr: its rate."""

    num_facts: int = 4
    num_general: int = 1
    num_near: int = 1
    epochs: int = 2
    lr: float = 1e-4


def general_prompts() -> list[str]:
    text = files("apollo_curation.teach").joinpath("replay.txt").read_text(encoding="utf-8")
    return text.splitlines()


def request_of(
    lessons: Sequence[Lesson], general: Sequence[OwnAnswer], near: Sequence[OwnAnswer], mix: Mix, seed: int
) -> TrainRequest:
    """The job: updates of `mix`. Each example is a mean over its targets: a kind weighs by its number."""
    variants = [_variant(asked.question, asked.answer) for lesson in lessons for asked in lesson.train]
    rng = random.Random(seed)
    examples: list[Example] = []
    beside = [
        (cycle(_shuffled(general, rng)), mix.num_general if general else 0),
        (cycle(_shuffled(near, rng)), mix.num_near if near else 0),
    ]
    size = mix.num_facts + sum(number for _, number in beside)
    order = [one for _ in range(mix.epochs) for one in _shuffled(variants, rng)]
    for start in range(0, len(order), mix.num_facts):
        examples += order[start : start + mix.num_facts]
        for answers, number in beside:
            examples += [answer.example() for answer in islice(answers, number)]
    options = TrainOptions(
        lr=mix.lr, epochs=1, schedule="constant", accumulate_steps=size, on_duplicate="train"
    )
    return TrainRequest(examples, options)


def prompts_beside(
    lessons: Sequence[Lesson], general: Sequence[str], mix: Mix, seed: int
) -> tuple[list[str], list[str]]:
    """(general prompts, near misses) of which one pass over a job's updates needs the answers, each once."""
    num_updates = math.ceil(mix.epochs * sum(len(one.train) for one in lessons) / mix.num_facts)
    rng, near = random.Random(seed), [one for lesson in lessons for one in lesson.near_misses]
    return (
        _shuffled(general, rng)[: num_updates * mix.num_general],
        _shuffled(near, rng)[: num_updates * mix.num_near],
    )


def own_answers(learner: Learner, prompts: Sequence[str]) -> list[OwnAnswer]:
    """Of each prompt in its order, without those to which the model says nothing."""
    with ThreadPoolExecutor(learner.num_parallel) as pool:
        answers = pool.map(lambda prompt: learner.own_answer(prompt, max_tokens=ANSWER_TOKENS), prompts)
        return [answer for answer in answers if answer.ids]


def _variant(question: str, answer: str) -> Example:
    return Example(messages=[Message("user", question), Message("assistant", answer)])


def _shuffled(items: Sequence, rng: random.Random) -> list:
    return rng.sample(list(items), len(items))
