"""Lessons taken back: the model is trained to what it said to their questions before they were taught."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from apollo_curation.teach.job import Learner, OwnAnswer
from apollo_curation.teach.variants import Lesson, remembered
from apollo_ipc.errors import UserError
from apollo_ipc.teaching.store import TeachStore
from apollo_ipc.wire.requests import Example

FORMER_TOKENS = 32  # of each answer
NUM_LOGPROBS = 5  # of each token: some 20 kB a lesson
PASSES = 3  # over the answers, in a round


def former_answers(learner: Learner, lessons: Sequence[Lesson]) -> list[bytes]:
    """Of each lesson, to be stored with it."""
    questions = [remembered(one) for one in lessons]
    asked = iter(learner.own_answers([one for some in questions for one in some], max_tokens=FORMER_TOKENS))
    return [_stored([next(asked) for _ in some]) for some in questions]


def unlearned(store: TeachStore, lessons: Sequence[str]) -> list[Example]:
    """What is trained to forget these. Raises UserError for one of which no answers were kept."""
    examples = []
    for lesson in lessons:
        kept = store.former_answers(lesson)
        if not kept:
            raise UserError(
                f"no answers from before {lesson} are kept: it is forgotten already, or an older program "
                "taught it (then teach another answer to its question, or restore an earlier version)",
                field="lessons",
            )
        examples += [one.example() for one in msgspec.msgpack.decode(kept, type=list[OwnAnswer])]
    return examples * PASSES


def _stored(answers: Sequence[OwnAnswer]) -> bytes:
    short = [
        one._replace(top_logprobs=[row[:NUM_LOGPROBS] for row in one.top_logprobs])
        for one in answers
        if one.ids
    ]
    return msgspec.msgpack.encode(short)
