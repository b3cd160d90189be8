"""What a step trains of tokens that are known: sequences, and what each of their targets counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec

from apollo_ipc.wire.examples import Example
from apollo_worker.jobs.alternatives import Alternative
from apollo_worker.jobs.conversation import invalid
from apollo_worker.jobs.example import TokenisedExample, Turn, sequence_of

T = TypeVar("T")


class Served(NamedTuple):
    """A turn in tokens. before: what vLLM gives the model; said: what it then has to say; message: which."""

    before: list[int]
    said: list[int]
    message: int | None = None
    note: str | None = None


def sequences_of(turns: list[Served], index: int) -> list[TokenisedExample]:
    """Turns share a sequence as long as each one's prompt begins with all that was said before."""
    sequences: list[tuple[list[int], list[Turn], list[str]]] = []
    for turn in turns:
        ids, marks, notes = sequences[-1] if sequences else ([], [], [])
        if not sequences or turn.before[: len(ids)] != ids:
            sequences.append(([], [], []))
            ids, marks, notes = sequences[-1]
        ids[:] = [*turn.before, *turn.said]
        marks.append(Turn(len(turn.before), len(ids), turn.message))
        if turn.note is not None and turn.note not in notes:
            notes.append(turn.note)
    return [sequence_of(ids, marks, index, notes) for ids, marks, notes in sequences]


def with_terms(sequence: TokenisedExample, example: Example, path: str) -> TokenisedExample:
    """The one sequence of given ids with what its targets have: those not 0 of weight."""
    before, said = len(example.context_ids or []), len(example.continuation_ids or [])
    weights = example.weights or [1.0] * said
    if not all(map(math.isfinite, weights)):
        raise invalid("a weight is a finite number", f"{path}.weights")
    kept = [at for at in range(said) if sequence.is_target[before + at] and weights[at] != 0]
    is_target = [False] * (before + said)
    for at in kept:
        is_target[before + at] = True

    def of_kept(values: list[T] | None) -> list[T] | None:
        return None if values is None else [values[at] for at in kept]

    return msgspec.structs.replace(
        sequence,
        is_target=is_target,
        weights=of_kept(example.weights),
        top_logprobs=of_kept(example.top_logprobs),
        advantages=of_kept(example.advantages),
        logprobs=of_kept(example.logprobs),
    )


def with_answer(sequence: TokenisedExample, one: Alternative) -> TokenisedExample:
    """The sequence of one of several answers with what it has beside the others."""
    num, logprobs = sequence.num_targets, one.logprobs
    if logprobs is not None:
        # The first token of a sequence is no target: nothing predicts it.
        logprobs = logprobs[len(logprobs) - num :]
    advantages = None if one.advantage is None else [one.advantage] * num
    return msgspec.structs.replace(sequence, advantages=advantages, logprobs=logprobs, label=one.is_chosen)


def labelled(sequences: Sequence[TokenisedExample], label: bool, field: str) -> TokenisedExample:
    """Raises UserError unless there is one answer: a label is of one."""
    if len(sequences) != 1 or len(sequences[0].turns) != 1:
        raise invalid(
            "a label is of one answer, and several turns are learned here: give earlier ones the weight 0",
            field,
        )
    return msgspec.structs.replace(sequences[0], label=label)


def unlike(sequences: Sequence[TokenisedExample], max_tokens: int) -> list[TokenisedExample]:
    """Behind each labelled sequence its context with the next one's answer, which is only read: it tells how
    far the model has moved on answers to something else (KTO, arXiv:2402.01306, section 4.1)."""
    pairs: list[TokenisedExample] = []
    for at, one in enumerate(sequences):
        pairs.append(one)
        other = sequences[(at + 1) % len(sequences)]
        context, answer = one.turns[0], other.turns[0]
        ids = [*one.input_ids[: context.start], *other.input_ids[answer.start : answer.end]][:max_tokens]
        if other is not one and len(ids) > max(context.start, 1):
            pairs.append(sequence_of(ids, [Turn(context.start, len(ids))], one.example))
    return pairs
