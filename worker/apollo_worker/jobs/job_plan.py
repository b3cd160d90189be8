"""One job for the trainer: which examples each step trains on, and at what learning rate."""

from __future__ import annotations

import math

import msgspec

from apollo_ipc.config import Train
from apollo_ipc.wire.requests import Example, TrainRequest
from apollo_worker.jobs.example import TokenisedExample, content_hash
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.jobs.schedule import learning_rate, resolve_schedule
from apollo_worker.jobs.tokenise import Tokeniser


class Plan(msgspec.Struct, frozen=True):
    """examples: the sequences to train, in order; hashes: for each, the hash of its example's content where
    it is the example's last sequence, else None; num_steps: updates over all epochs; accumulate_steps:
    sequences of one update."""

    examples: list[TokenisedExample]
    hashes: list[bytes | None]
    num_steps: int
    num_skipped: int
    lr: float
    weight_decay: float
    schedule: str
    warmup_fraction: float
    accumulate_steps: int = 1

    def examples_of(self, step: int) -> list[TokenisedExample]:
        """Those of step number `step` (from 0): in the order sent, epoch after epoch. No step goes over the
        end of an epoch, so its last one may have fewer."""
        start = step % steps_of_epoch(len(self.examples), self.accumulate_steps) * self.accumulate_steps
        return self.examples[start : start + self.accumulate_steps]

    def hashes_of(self, num_steps: int) -> list[bytes]:
        """Hashes of the examples that the first `num_steps` steps have trained, each once."""
        return list(
            dict.fromkeys(h for h in self.hashes[: num_steps * self.accumulate_steps] if h is not None)
        )

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            self.num_steps,
            peak=self.lr,
            schedule=self.schedule,  # pyright: ignore[reportArgumentType]
            warmup_fraction=self.warmup_fraction,
        )


def plan(request: TrainRequest, tokeniser: Tokeniser, queue: JobQueue, defaults: Train) -> Plan:
    """Tokenises every example. Raises UserError with the path of the field that is wrong."""
    options = request.options
    kept, skipped = _without_duplicates(request, queue, options.on_duplicate or defaults.on_duplicate)
    sequences = tokeniser.encode_all(kept)
    last_of = {sequence.example: at for at, sequence in enumerate(sequences)}
    hashes: list[bytes | None] = [None] * len(sequences)
    for i, example in kept:
        hashes[last_of[i]] = content_hash(example)
    group = options.accumulate_steps or defaults.accumulate_steps
    num_steps = steps_of_epoch(len(sequences), group) * (options.epochs or defaults.epochs)
    if options.max_steps is not None:
        num_steps = min(num_steps, options.max_steps)
    return Plan(
        examples=sequences,
        hashes=hashes,
        num_steps=num_steps,
        num_skipped=skipped,
        lr=defaults.lr if options.lr is None else options.lr,
        weight_decay=defaults.weight_decay if options.weight_decay is None else options.weight_decay,
        schedule=resolve_schedule(options.schedule or defaults.schedule, len(sequences)),
        warmup_fraction=defaults.warmup_fraction,
        accumulate_steps=group,
    )


def steps_of_epoch(num_examples: int, accumulate_steps: int) -> int:
    return math.ceil(num_examples / accumulate_steps)


def _without_duplicates(
    request: TrainRequest, queue: JobQueue, on_duplicate: str
) -> tuple[list[tuple[int, Example]], int]:
    """((index in the request, example) to train, how many were left out as trained before)."""
    numbered = list(enumerate(request.examples))
    if on_duplicate == "train":
        return numbered, 0
    known = queue.known_examples(content_hash(example) for example in request.examples)
    kept = [(i, example) for i, example in numbered if content_hash(example) not in known]
    return kept, len(numbered) - len(kept)
