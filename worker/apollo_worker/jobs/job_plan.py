"""A job as it is stored and executed: the tokens of each step and its learning rate, decided at submit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Literal

import msgspec
import xxhash

from apollo_ipc.config import Train
from apollo_ipc.wire.requests import TrainRequest, check_request
from apollo_worker.jobs.example import TokenisedExample, content_hash
from apollo_worker.jobs.objective import BY_EXAMPLE, Objective, make_objective
from apollo_worker.jobs.sequences import unlike

if TYPE_CHECKING:  # it imports transformers, which takes seconds; plans are stored and read without it
    from apollo_worker.jobs.tokenise import Tokeniser

Schedule = Literal["auto", "constant", "cosine"]
Resolved = Literal["constant", "cosine"]


class AdamRule(msgspec.Struct, frozen=True, omit_defaults=True):
    """None: as the optimizer is configured."""

    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None


class JobPlan(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Everything that a job's steps depend on, but the optimizer's own configuration.

    examples: the sequences to train, in order; hashes: for each, the hash of its example's content where it
    is the example's last sequence, else None; num_examples: as sent, num_skipped of them known before;
    num_steps: updates over all epochs; lr: peak; accumulate_steps: sequences of one update; rank: the job's
    own, None for the optimizer's; is_mean: of an update's losses, else their sum; known_text: tokens that are
    not trained, which the loss guard looks at; objective: what is minimised; starts: where the sequences of
    each unit begin, which one update takes together (empty: each sequence is a unit), and accumulate_steps
    counts units; advantages: of each group sent, an answer each; adam: the job's own rule for the moments;
    embeddings: whether they and the output layer are trained. Stored: a new field goes last and has a
    default.
    """

    examples: list[TokenisedExample]
    hashes: list[bytes | None]
    num_examples: int
    num_steps: int
    lr: float
    weight_decay: float
    schedule: Resolved
    warmup_fraction: float
    accumulate_steps: int = 1
    num_skipped: int = 0
    rank: int | None = None
    is_mean: bool = True
    known_text: list[int] = []
    objective: Objective = Objective()
    starts: list[int] = []
    advantages: list[list[float]] = []
    adam: AdamRule = AdamRule()
    embeddings: Literal["train", "freeze"] = "train"

    @property
    def is_plain(self) -> bool:
        """Whether a step's loss is nats a token, which can be compared with other jobs'."""
        is_entropy = self.objective.loss == "cross_entropy" and self.objective.target_probability == 1
        return is_entropy and self.is_mean and all(one.weights is None for one in self.examples)

    @property
    def num_units(self) -> int:
        return len(self.starts) or len(self.examples)

    def rows_of(self, step: int) -> range:
        """Which of `examples` step number `step` (from 0) trains: in the order sent, epoch after epoch. No
        step goes over the end of an epoch, so its last one may have fewer."""
        unit = step % self.steps_of_epoch * self.accumulate_steps
        return range(self._start(unit), self._start(unit + self.accumulate_steps))

    def examples_of(self, step: int) -> list[TokenisedExample]:
        rows = self.rows_of(step)
        return self.examples[rows.start : rows.stop]

    def updates(self) -> Iterator[list[TokenisedExample]]:
        """What each step of the first epoch trains."""
        return map(self.examples_of, range(min(self.num_steps, self.steps_of_epoch)))

    @property
    def steps_of_epoch(self) -> int:
        return steps_of_epoch(self.num_units, self.accumulate_steps)

    def hashes_of(self, num_steps: int) -> list[bytes]:
        """Hashes of the examples that the first `num_steps` steps have trained, each once."""
        trained = self.hashes[: self._start(num_steps * self.accumulate_steps)]
        return list(dict.fromkeys(one for one in trained if one is not None))

    def notes(self) -> list[str]:
        """What its sender should know of what is trained."""
        if not (num_equal := sum(not any(one) for one in self.advantages)):
            return []
        of_all = f"{num_equal} of {len(self.advantages)} groups have equal rewards"
        return [f"{of_all}: nothing is learned of them"]

    def _start(self, unit: int) -> int:
        if not self.starts:
            return min(unit, len(self.examples))
        return self.starts[unit] if unit < len(self.starts) else len(self.examples)

    def learning_rate(self, step: int) -> float:
        """Of step number `step` (from 0)."""
        return learning_rate(step, self.num_steps, self.lr, self.schedule, self.warmup_fraction)


def learning_rate(
    step: int, num_steps: int, peak: float, schedule: Resolved, warmup_fraction: float
) -> float:
    """Of `step` (0-based) in a job of `num_steps`.

    "cosine": ceil(warmup_fraction * num_steps) steps rise linearly from peak / that number to peak; from
    there half a cosine falls towards 0, which it would reach at step `num_steps`, one past the last. So no
    step has a rate of 0: each one costs a forward and a backward pass, and shall do something.
    """
    assert 0 <= step < num_steps, f"step {step} of {num_steps}"
    if schedule == "constant":
        return peak
    # Without the allowance 0.1 * 30 = 3.0000000000000004 would be four steps.
    num_warmup = math.ceil(warmup_fraction * num_steps - 1e-9)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


_encoder = msgspec.msgpack.Encoder()
_MARK = b"\xc1"  # no value of msgpack begins so
_NUM_DIGEST_BYTES = 16
_decoder = msgspec.msgpack.Decoder(JobPlan)


def encode_plan(plan: JobPlan) -> bytes:
    """With its digest behind it: a flipped bit in a token is a plan as good as any."""
    body = _encoder.encode(plan)
    return body + _MARK + xxhash.xxh3_128_digest(body)


def decode_plan(body: bytes) -> JobPlan | None:
    """None for bytes that no program of this project wrote. An older one wrote no digest; none wrote fields
    that are unknown here (a flipped bit may make the digest the value of one)."""
    at = len(body) - _NUM_DIGEST_BYTES - len(_MARK)
    if body[at : at + 1] == _MARK and xxhash.xxh3_128_digest(body[:at]) == body[at + 1 :]:
        body = body[:at]
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def plan(
    request: TrainRequest,
    tokeniser: Tokeniser,
    defaults: Train,
    known_examples: Callable[[Iterable[bytes]], set[bytes]],
    on_progress: Callable[[], None] = lambda: None,
) -> JobPlan:
    """Tokenises every example that is to be trained. known_examples: those of some hashes that were trained,
    or are going to be; under on_duplicate = "skip" they are left out. on_progress: as encode_all has it.

    Raises UserError with the path of the field that is wrong.
    """
    options, loss = request.options, check_request(request)
    numbered = [(i, example, content_hash(example)) for i, example in enumerate(request.examples)]
    is_skipping = (options.on_duplicate or defaults.on_duplicate) == "skip"
    known: set[bytes] = known_examples(one for _, _, one in numbered) if is_skipping else set()
    kept = [(i, example, one) for i, example, one in numbered if one not in known]
    sequences = tokeniser.encode_all([(i, example) for i, example, _ in kept], on_progress)
    groups = _by_example(sequences)
    advantages: list[list[float]] = []
    if loss == "grpo":
        advantages = [[(one.advantages or [0.0])[0] for one in group] for group in groups]
        groups = [group for group, values in zip(groups, advantages, strict=True) if any(values)]
    elif loss == "kto":
        groups = _by_example(unlike(sequences, tokeniser.max_tokens))
    sequences = [sequence for group in groups for sequence in group]
    starts = [0, *accumulate(map(len, groups))][:-1] if loss in BY_EXAMPLE else []
    num_units = len(starts) or len(sequences)
    last_of = {sequence.example: at for at, sequence in enumerate(sequences)}
    hashes: list[bytes | None] = [None] * len(sequences)
    for i, _, one in kept:
        if i in last_of:  # a group without spread has no sequences
            hashes[last_of[i]] = one
    group = options.accumulate_steps or defaults.accumulate_steps
    num_steps = steps_of_epoch(num_units, group) * (options.epochs or defaults.epochs)
    if options.max_steps is not None:
        num_steps = min(num_steps, options.max_steps)
    return JobPlan(
        examples=sequences,
        hashes=hashes,
        num_examples=len(numbered),
        num_steps=num_steps,
        lr=defaults.lr if options.lr is None else options.lr,
        weight_decay=defaults.weight_decay if options.weight_decay is None else options.weight_decay,
        schedule=resolve_schedule(options.schedule or defaults.schedule, num_units),
        warmup_fraction=defaults.warmup_fraction,
        accumulate_steps=group,
        num_skipped=len(numbered) - len(kept),
        rank=options.rank,
        is_mean=options.reduction != "sum",
        known_text=known_text(tokeniser),
        objective=make_objective(
            loss,
            options,
            is_to_reference=num_steps > 1 and any(one.logprobs is None for one in sequences),
        ),
        starts=starts,
        advantages=advantages,
        adam=AdamRule(options.beta1, options.beta2, options.eps),
        embeddings=options.embeddings or "train",
    )


def _by_example(sequences: Iterable[TokenisedExample]) -> list[list[TokenisedExample]]:
    return [list(group) for _, group in groupby(sequences, lambda sequence: sequence.example)]


def known_text(tokeniser: Tokeniser) -> list[int]:
    """The tokens that the loss guard looks at; none where this model cannot have them."""
    ids = tokeniser.tokenizer.known_text[: tokeniser.max_tokens] if tokeniser.tokenizer else []
    return ids if max(ids, default=0) < tokeniser.vocab_size else []


def steps_of_epoch(num_examples: int, accumulate_steps: int) -> int:
    return math.ceil(num_examples / accumulate_steps)


def resolve_schedule(schedule: Schedule, num_examples: int) -> Resolved:
    """What "auto" means for a job: constant for a single example, cosine with warm-up for a bulk job."""
    if schedule == "auto":
        return "constant" if num_examples == 1 else "cosine"
    return schedule
