"""An example as it is stored and trained, and what it is known by. No tokenizer is needed to read one."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from apollo_ipc.wire.requests import Example


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """Tokens `start` to `end` (exclusive) of a sequence: what the model has to generate after those before
    `start`, which are token for token what vLLM would have given it. message: index of the assistant's
    message that they are, None where the example has no messages."""

    start: int
    end: int
    message: int | None = None


class TokenisedExample(msgspec.Struct, frozen=True):
    """One sequence to train on; plain data, stored as it is.

    An example gives one sequence, or several: a conversation whose history is rendered otherwise than it was
    served (models that drop earlier thoughts) has a sequence for each rendering.

    input_ids: the whole sequence; is_target: per token, whether the loss is taken of predicting it;
    example: index in the request of the example that it is of; turns: the runs of targets, in order. They say
    whose the targets are; a run that starts at 0 has a first token that nothing predicts, which is no target,
    and one whose weight is 0 is none either. notes: what its sender should know.
    weights, top_logprobs: of each target, in order (None: 1; the token itself); advantages, logprobs:
    likewise, how good it was, and what its sampler gave it. label: of a pair's two, whether it is the chosen
    one; of an answer alone, whether it is good; None of what is only read beside them. Stored: new fields go
    last.
    """

    input_ids: list[int]
    is_target: list[bool]
    example: int = 0
    turns: list[Turn] = []
    notes: list[str] = []
    weights: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]] | None] | None = None
    advantages: list[float] | None = None
    logprobs: list[float] | None = None
    label: bool | None = None

    @property
    def num_targets(self) -> int:
        """Nothing predicts the first token."""
        return sum(self.is_target[1:])


def sequence_of(
    input_ids: list[int], turns: list[Turn], example: int = 0, notes: list[str] | None = None
) -> TokenisedExample:
    is_target = [False] * len(input_ids)
    for turn in turns:
        is_target[turn.start : turn.end] = [True] * (turn.end - turn.start)
    if is_target:
        is_target[0] = False
    return TokenisedExample(input_ids, is_target, example, turns, notes or [])


def content_hash(example: Example) -> bytes:
    """32 bytes that are equal for equal examples, whatever the order of keys in what the client sent."""
    return blake2b(msgspec.json.encode(example, order="sorted"), digest_size=32).digest()


_encoder = msgspec.msgpack.Encoder(order="deterministic")


def request_digest(request: msgspec.Struct) -> bytes:
    """16 bytes; key order inside free-form parts (tools, tool_calls) does not make one request two."""
    return blake2b(_encoder.encode(request), digest_size=16).digest()
