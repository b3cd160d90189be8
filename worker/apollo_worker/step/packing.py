"""Sequences of one update, several of them in one forward and backward pass, padded on the right.

A row of a batch is a sequence of its own: attention is causal and recurrent layers have a state for each row,
so what stands to the right of a sequence, or in another row, changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_PADDING = 0.25  # of a batch


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of each batch's sequences, longest first: at most max_tokens with their padding (or one
    sequence), at most MAX_PADDING of them padding. So a pass takes no more memory than one over the longest
    example that may be sent."""
    batches: list[list[int]] = []
    num_real = 0
    for at in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            num_padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]]
            if num_padded <= max_tokens and num_real + lengths[at] >= (1 - MAX_PADDING) * num_padded:
                batches[-1].append(at)
                num_real += lengths[at]
                continue
        batches.append([at])
        num_real = lengths[at]
    return batches
