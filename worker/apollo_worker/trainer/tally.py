"""The trainer's part of `Tally`: each function replaces it in `state` by one with one more thing in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec.structs import replace

from apollo_ipc.wire.replies import SyncResult, TrainerState
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.step.step import StepResult


def note_phases(state: TrainerState, **seconds: float) -> None:
    """seconds: phase -> what it took."""
    before = state.tally.step_s
    step_s = {**before, **{name: before.get(name, 0.0) + s for name, s in seconds.items()}}
    state.tally = replace(state.tally, step_s=step_s)


def note_step(
    state: TrainerState,
    examples: Sequence[TokenisedExample],
    result: StepResult,
    step_s: float,
    record_s: float,
) -> None:
    """step_s: of the whole step; record_s: until its mark and its loss were written."""
    forward_s = result.forward_s
    note_phases(state, forward=forward_s, backward=max(0.0, step_s - forward_s), record=record_s)
    tally = state.tally
    state.tally = replace(
        tally,
        num_steps=tally.num_steps + 1,
        num_bad_steps=tally.num_bad_steps + result.is_bad,
        num_tokens=tally.num_tokens + sum(len(example.input_ids) for example in examples),
    )
    if torch.cuda.is_available():
        state.device_bytes = torch.cuda.max_memory_reserved()


def note_sync(state: TrainerState, sync: SyncResult) -> None:
    tally = state.tally
    state.tally = replace(
        tally,
        num_syncs=tally.num_syncs + 1,
        sync_s=tally.sync_s + sync.duration_s,
        sync_waited_s=tally.sync_waited_s + sync.training_waited_s,
        sync_bytes=tally.sync_bytes + sync.bytes_written,
    )


def note_failed_sync(state: TrainerState) -> None:
    state.tally = replace(state.tally, num_sync_failures=state.tally.num_sync_failures + 1)


def note_torn_step(state: TrainerState) -> None:
    state.tally = replace(state.tally, num_torn_steps=state.tally.num_torn_steps + 1)
