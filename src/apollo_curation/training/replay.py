"""What stands beside a batch's moments: the served model's own answers to other prompts, which it is to keep.

In each update, by KL to its top log-probabilities from before the batch, as in a lesson (teach/job.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from apollo_curation.settings import Tier
from apollo_curation.teach.job import ANSWER_TOKENS, Learner, Mix, OwnAnswer, held_prompts, request_of
from apollo_ipc.errors import NotReady
from apollo_ipc.wire.requests import Example, TrainRequest

MAX_CONTEXT_TOKENS = 1024  # of a held-out prompt: a longer one would cost more than what is trained
ANSWER_BYTES = 18 * 1024  # JSON of one answer at most: 16 tokens with 20 (token, log-probability) each
# Of a lesson's recipe the answers' weight alone: what else a lesson has was not measured here.
RECIPE = Mix(num_near=0, target_probability=1.0, freezes_embeddings=False)


class Keeper(Learner, Protocol):
    """A model that is also asked what it says in place of an example's answer."""

    def own_answers_behind(
        self, examples: Sequence[Example], *, max_tokens: int, max_context_tokens: int
    ) -> list[OwnAnswer]: ...


class Replay:
    """heldout: the operator's held-out set, of which the prompts are asked."""

    def __init__(self, learner: Keeper, heldout: Callable[[], Sequence[Example]] = list):
        self._learner, self._heldout = learner, heldout

    def ask(self, learned: Sequence[Example], tier: Tier, seed: int) -> list[OwnAnswer]:
        """What is held beside `learned`, as the served weights now are: built-in prompts and held-out ones in
        turn, none that `learned` gives an answer to; an answer for each place of the job, where there are so
        many. Raises NotReady where the model says nothing, and as ChatClient does.
        """
        rng, taught = random.Random(seed), {_asked(one) for one in learned}
        heldout = _shuffled((one for one in self._heldout() if _asked(one) not in taught), rng)
        general = _shuffled((one for one in held_prompts() if _flat(one) not in taught), rng)
        num = num_held(len(learned), tier)
        num_heldout = min(len(heldout), max(num // 2, num - len(general)))
        own = self._learner.own_answers_behind(
            heldout[:num_heldout], max_tokens=ANSWER_TOKENS, max_context_tokens=MAX_CONTEXT_TOKENS
        )
        own += self._learner.own_answers(general[: num - len(own)], max_tokens=ANSWER_TOKENS)
        if not (own := [one for one in own if one.ids]):
            raise NotReady(
                "the served model says nothing to any prompt whose answer is to be held: nothing is trained "
                "without (hold = 0 in the tier's section switches it off)"
            )
        return own


def num_held(num_examples: int, tier: Tier) -> int:
    """Answers beside so many examples, over all passes."""
    return tier.hold * math.ceil(tier.epochs * num_examples / tier.examples_per_update)


def request_bytes(example: Example, tier: Tier | None) -> int:
    """What `example` adds to a request of JSON, at most; tier: where answers are held beside it."""
    size = len(msgspec.json.encode(example))
    if tier is None or not tier.hold:
        return size
    return tier.epochs * (size + ANSWER_BYTES * tier.hold // tier.examples_per_update)


def held_request(
    learned: Sequence[Example],
    held: Sequence[OwnAnswer],
    tier: Tier,
    seed: int,
    recipe: Mix = RECIPE,
) -> TrainRequest:
    """The job of `learned` with `held` (Replay.ask) beside it, of which an answer may return. Each of
    `learned` is in it `tier.epochs` times. recipe: what `tier` leaves open, so the weight."""
    mix = msgspec.structs.replace(
        recipe,
        num_facts=tier.examples_per_update,
        num_general=tier.hold,
        epochs=tier.epochs,
        lr=tier.lr,
        schedule=tier.schedule,
    )
    made = request_of(learned, held, [], mix, seed)
    options = msgspec.structs.replace(made.options, on_duplicate="skip")
    return TrainRequest(made.examples, options)


def held_in(request: TrainRequest) -> list[OwnAnswer]:
    """Each of the answers that stand beside what is learned, once."""
    found = {str(one.context_ids): one for one in request.examples if is_held(one)}
    return [
        OwnAnswer(
            one.context_ids or [], one.continuation_ids or [], [row or [] for row in one.top_logprobs or []]
        )
        for one in found.values()
    ]


def is_held(example: Example) -> bool:
    """A moment's example has no tokens of its own."""
    return example.top_logprobs is not None


def _asked(example: Example) -> str:
    """The last thing that a person says in it."""
    said = [one.content for one in example.messages or [] if one.role == "user"]
    return _flat(said[-1] if said else example.prompt or "")


def _flat(text: str) -> str:
    return " ".join(text.split()).casefold()


def _shuffled(items: Iterable, rng: random.Random) -> list:
    items = list(items)
    return rng.sample(items, len(items))
