"""Jobs in a queue without a tokenizer: a request's plan has the bytes of its text as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apollo_worker.jobs.example import TokenisedExample, content_hash, request_digest
from apollo_worker.jobs.job_plan import JobPlan, plan
from apollo_worker.jobs.queue import Job, JobQueue

from apollo_ipc.config import Train
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import Example, TrainOptions, TrainRequest


def plan_of(request: TrainRequest, num_steps: int = 1, num_skipped: int = 0) -> JobPlan:
    texts = [str(one.completion or one.messages or one.continuation_ids).encode() for one in request.examples]
    return JobPlan(
        examples=[TokenisedExample([0, *text], [False] + [True] * len(text)) for text in texts],
        hashes=[content_hash(example) for example in request.examples],
        num_examples=len(request.examples),
        num_steps=num_steps,
        lr=request.options.lr or 1e-3,
        weight_decay=0.0,
        schedule="constant",
        warmup_fraction=0.0,
        num_skipped=num_skipped,
        rank=request.options.rank,
    )


def submit(queue: JobQueue, request: TrainRequest, *, num_steps: int = 1, **options) -> JobInfo:
    return queue.submit(plan_of(request, num_steps), request_digest(request), **options)


def text_of(job: Job) -> str:
    """The completion of its first example."""
    return bytes(job.plan.examples[0].input_ids[1:]).decode()


def request_of(text="hello", **options):
    return TrainRequest(examples=[Example(prompt="say", completion=text)], options=TrainOptions(**options))


def states(queue):
    return [job.state for job in reversed(queue.list())]


def reopen(queue, path):
    queue.close()
    return JobQueue(path, max_queued=100)


def hash_of(text):
    return content_hash(request_of(text).examples[0])


class Words:
    """A tokeniser of which only the number of calls matters."""

    tokenizer = None
    vocab_size = 256
    max_tokens = 64

    def encode_all(
        self, numbered: Iterable[tuple[int, Example]], on_progress: Callable[[], None]
    ) -> list[TokenisedExample]:
        return [
            TokenisedExample([0, *ids], [False] + [True] * len(ids), i)
            for i, example in numbered
            if (ids := example.continuation_ids) is not None
        ]


def plan_of_tokens(ids: list[int], defaults: Train | None = None, **options: Any) -> JobPlan:
    """By the product's own planning: an example of each token."""
    examples = [Example(context_ids=[0], continuation_ids=[one]) for one in ids]
    request = TrainRequest(examples, TrainOptions(**options))
    return plan(request, Words(), defaults or Train(), lambda _: set())  # pyright: ignore[reportArgumentType]
