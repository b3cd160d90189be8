"""What would be trained of examples, to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apollo_ipc.errors import UserError
from apollo_ipc.wire.replies import FieldError, Previewed
from apollo_ipc.wire.requests import Example
from apollo_worker.jobs.tokenise import Tokeniser


def preview(tokeniser: Tokeniser, examples: Sequence[Example | UserError]) -> list[Previewed]:
    """In the order given: each learned turn of an example, or why the example is refused."""
    shown: list[Previewed] = []
    for i, example in enumerate(examples):
        try:
            if isinstance(example, UserError):
                raise example
            shown += _turns(tokeniser, example, i)
        except UserError as error:
            shown.append(Previewed(i, error=FieldError(error.field, error.message)))
    return shown


def _no_text(_: list[int]) -> str:
    return ""


def _turns(tokeniser: Tokeniser, example: Example, i: int) -> list[Previewed]:
    served = tokeniser.tokenizer
    decode: Callable[[list[int]], str] = served.decode if served is not None else _no_text
    return [
        Previewed(i, turn.message, before, said, decode(before), decode(said), sequence.notes)
        for sequence in tokeniser.encode(example, f"examples[{i}]", i)
        for turn in sequence.turns
        for before, said in [(sequence.input_ids[: turn.start], sequence.input_ids[turn.start : turn.end])]
    ]
