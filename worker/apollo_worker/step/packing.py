"""Sequences of one update, several of them in one forward and backward pass.

A batch has rows, padded on the right. A row is one sequence, or several that begin alike (a template's system
prompt, the prompt of a group or of a pair): their beginning stands in it once, then the rest of each, and a
mask has each token see the beginning and its own sequence alone. What stands to the right of a sequence, or
in another row, changes nothing of it: attention is causal, and recurrent layers have a state for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from apollo_worker.jobs.example import TokenisedExample

MAX_PADDING = 0.25  # of a batch
MIN_SAVED = 0.2  # of a pass's tokens: less is not worth a mask
ROW_TOKENS = 512  # a longer row only where its attention costs no more than that of its sequences alone


class PackedRow(NamedTuple):
    """at: indices of its sequences; shared: tokens that all of them begin with, which stand in it once;
    length: of the row, in tokens."""

    at: list[int]
    shared: int
    length: int


def packed(
    examples: Sequence[TokenisedExample],
    max_tokens: int,
    longest_shared: int = 0,
    max_padding: float = MAX_PADDING,
) -> list[list[PackedRow]]:
    """The batches of one update. longest_shared: tokens of the longest sequence that may be in a row with
    others; 0: none may; max_padding: as `pack` has it."""
    lengths = [len(one.input_ids) for one in examples]
    alone = pack([PackedRow([at], 0, length) for at, length in enumerate(lengths)], max_tokens, max_padding)
    if longest_shared == 0 or len(examples) < 2:
        return alone
    shared = pack(_rows(examples, max_tokens, longest_shared), max_tokens, max_padding)
    saves = _num_tokens(shared) <= (1 - MIN_SAVED) * _num_tokens(alone)
    return shared if saves and len(shared) <= len(alone) else alone


def pack(
    rows: Sequence[PackedRow], max_tokens: int, max_padding: float = MAX_PADDING
) -> list[list[PackedRow]]:
    """Batches of rows, longest first: at most max_tokens with their padding (or one row), at most max_padding
    of them padding. So a pass takes no more memory than one over the longest example that may be sent."""
    batches: list[list[PackedRow]] = []
    num_real = 0
    for row in sorted(rows, key=lambda row: -row.length):
        if batches:
            num_padded = (len(batches[-1]) + 1) * batches[-1][0].length
            if num_padded <= max_tokens and num_real + row.length >= (1 - max_padding) * num_padded:
                batches[-1].append(row)
                num_real += row.length
                continue
        batches.append([row])
        num_real = row.length
    return batches


def _rows(examples: Sequence[TokenisedExample], max_tokens: int, longest_shared: int) -> list[PackedRow]:
    """Neighbours in the order of their tokens, as long as a row of them is worth it."""
    rows: list[PackedRow] = []
    for at in sorted(range(len(examples)), key=lambda i: examples[i].input_ids):
        length = len(examples[at].input_ids)
        if rows and max(length, len(examples[rows[-1].at[0]].input_ids)) <= longest_shared:
            joined = _joined(examples, rows[-1], at)
            if joined is not None and joined.length <= max_tokens:
                rows[-1] = joined
                continue
        rows.append(PackedRow([at], 0, length))
    return rows


def _joined(examples: Sequence[TokenisedExample], row: PackedRow, at: int) -> PackedRow | None:
    """The row with one more sequence; None where it should begin a row of its own."""
    first, new = examples[row.at[0]], examples[at]
    limit = min(_num_shareable(new), row.shared if len(row.at) > 1 else _num_shareable(first))
    shared = _num_alike(first.input_ids, new.input_ids, limit)
    lengths = [*(len(examples[i].input_ids) for i in row.at), len(new.input_ids)]
    length = sum(lengths) - (len(lengths) - 1) * shared
    is_cheap = length <= ROW_TOKENS or length**2 <= sum(one**2 for one in lengths)
    # What the new one saves must outweigh what a shorter beginning costs those that are there.
    if not is_cheap or length - row.length > (1 - MIN_SAVED) * len(new.input_ids):
        return None
    return PackedRow([*row.at, at], shared, length)


def _num_shareable(example: TokenisedExample) -> int:
    """The token before the first target predicts it, and stays with its own sequence."""
    return max(0, example.is_target.index(True) - 1) if True in example.is_target else len(example.input_ids)


def _num_alike(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    return next((at for at in range(limit) if one[at] != other[at]), limit)


def _num_tokens(batches: Sequence[Sequence[PackedRow]]) -> int:
    """With their padding."""
    return sum(len(batch) * batch[0].length for batch in batches)
