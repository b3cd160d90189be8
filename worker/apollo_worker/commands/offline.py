"""`apollo-ipc train --offline MODEL_DIR FILE`: the same trainer on the directory itself, without a server.

Prints JSON lines: {"note"} before all, {"step", "num_steps", "loss"} a step, and {"job": ...} at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import msgspec
from torch import Tensor

from apollo_ipc.checkpoint import read_commit, recover
from apollo_ipc.checkpoint.owner import hold_model
from apollo_ipc.config import Config, load_config
from apollo_ipc.errors import ApolloError
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import TrainRequest, parse_train_body
from apollo_worker.front.admission import load
from apollo_worker.jobs.job_plan import plan
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.loss_guard import guard_of
from apollo_worker.step.step import Trainer
from apollo_worker.trainer.attachment import load_optimizer, make_writer, model_facts
from apollo_worker.trainer.recovery import num_steps_of


def train(
    model_dir: Path,
    request: TrainRequest,
    config: Config,
    on_step: Callable[[int, int, float], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> JobInfo:
    """Trains on `request` and syncs the directory once, at the end: it holds the old weights or the new ones.

    on_step: called with (step from 1, number of steps, loss); on_note: with what is to be known before the
    first one. Raises UserError for a bad example, AttachError for a model that cannot be trained,
    CheckpointError when another process works on the directory or the sync fails.
    """
    with hold_model(model_dir, "apollo-ipc train --offline") or nullcontext():
        return _train(model_dir, request, config, on_step, on_note)


def _train(
    model_dir: Path,
    request: TrainRequest,
    config: Config,
    on_step: Callable[[int, int, float], None] | None,
    on_note: Callable[[str], None] | None,
) -> JobInfo:
    recover(model_dir)
    live = load_offline(model_dir)
    trainer = Trainer(live, config.train)
    trainer.use_rank(request.options.rank)
    commit = read_commit(model_dir)
    load_optimizer(trainer, model_dir, commit)
    todo = plan(request, load(model_facts(live, trainer, config)), config.train, lambda _: set())
    notes = [*todo.notes(), *trainer.prepare_accumulation(todo)]
    if on_note is not None:
        for note in notes:
            on_note(note)
    started, losses = time.time(), []
    guard = guard_of(trainer, todo)  # what it raises leaves the directory as it was
    reference: list[list[Tensor]] = []  # of each step of an epoch
    if todo.objective.needs_reference:
        reference = [trainer.logprobs_of(some) for some in todo.updates()]
    for step in range(todo.num_steps):
        result = trainer.step_on(
            todo.examples_of(step),
            todo.learning_rate(step),
            todo.weight_decay,
            is_mean=todo.is_mean,
            objective=todo.objective,
            reference=reference[step % len(reference)] if reference else None,
            adam=todo.adam,
            embeddings=todo.embeddings,
        )
        losses.append(result.loss)
        guard.look(step + 1, result.loss, is_written=not result.is_bad)
        if on_step is not None:
            on_step(step + 1, todo.num_steps, result.loss)
    guard.check()
    version = (commit.weight_version if commit else 0) + 1
    optimizer = trainer.main_optimizer
    num_counted = todo.num_steps if trainer.optimizer is optimizer else 0
    make_writer(live, config).sync(
        weight_version=version,
        applied_seq=commit.applied_seq if commit else 0,
        optimizer=(optimizer.state_tensors(), optimizer.state_meta()),
        extra={**(commit.extra if commit else {}), "optimizer_steps": num_steps_of(commit) + num_counted},
    )
    return JobInfo(
        job_id="offline",
        seq=0,
        state="durable",
        created_at=started,
        started_at=started,
        ended_at=time.time(),
        num_examples=len(request.examples),
        num_steps=todo.num_steps,
        steps_done=todo.num_steps,
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        weight_version=version,
        num_skipped=todo.num_skipped,
        loss_history=losses,
        notes=notes,
        loss=todo.objective.loss,
        advantages=todo.advantages or None,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m apollo_worker.commands.offline", description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("request", help="a JSON file with the body of POST /train, - for standard input")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--json", action="store_true", help="the only form of output; accepted for symmetry")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)

    def show(step: int, num_steps: int, loss: float) -> None:
        print(json.dumps({"step": step, "num_steps": num_steps, "loss": loss}), flush=True)

    def tell(note: str) -> None:
        print(json.dumps({"note": note}), flush=True)

    try:
        body = sys.stdin.buffer.read() if options.request == "-" else Path(options.request).read_bytes()
        request = parse_train_body(body)
        job = train(options.model_dir, request, load_config(options.config), show, tell)
    except ApolloError as error:
        where = f"{error.field}: " if error.field else ""
        print(f"apollo-ipc: {where}{error.message}", file=sys.stderr)
        return error.exit_code
    print(msgspec.json.encode({"job": job}).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
