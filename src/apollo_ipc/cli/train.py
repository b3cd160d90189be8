"""`apollo-ipc train`: a job for the worker, or (--offline) training without any server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from apollo_ipc.cli.examples import read_examples
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import FAILED_STATES, describe_job, print_json
from apollo_ipc.cli.processes import worker_environment
from apollo_ipc.config import Config, load_config
from apollo_ipc.errors import ApolloError, NotReady, UserError
from apollo_ipc.model_dir import check_model_dir
from apollo_ipc.process.progress import progress
from apollo_ipc.process.say import say
from apollo_ipc.wire.losses import LossName
from apollo_ipc.wire.messages import Submit
from apollo_ipc.wire.replies import ENDED_STATES, JobInfo
from apollo_ipc.wire.requests import TrainOptions, TrainRequest, convert

SUBMIT_TIMEOUT_S = 3600.0  # many examples are tokenised for minutes before they are accepted
WORKER_AWAY_S = 60.0  # --wait outlasts a worker that restarts


def train(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL, one example a line; - for standard input.")
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the served weights have it.")] = False,
    lr: Annotated[float | None, typer.Option(help="Learning rate (peak).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the examples.")] = None,
    schedule: Annotated[Literal["auto", "constant", "cosine"] | None, typer.Option()] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of APOLLO's projection.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    accumulate_steps: Annotated[
        int | None, typer.Option(help="Examples of one update; several passes keep all gradients.")
    ] = None,
    loss: Annotated[
        LossName | None, typer.Option(help="What is minimised; else what the examples' form says.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of dpo and kto [0.1], and of dro [0.05].")] = None,
    clip: Annotated[
        list[float] | None, typer.Option(help="Of ppo, cispo, grpo [0.2]; twice: below and above.")
    ] = None,
    kl_to_reference: Annotated[
        float | None, typer.Option(help="What a token's divergence from the weights of before costs.")
    ] = None,
    target_probability: Annotated[
        float | None, typer.Option(help="What a target shall reach [1]; beyond it there is no loss.")
    ] = None,
    embeddings: Annotated[
        Literal["train", "freeze"] | None, typer.Option(help="And the output layer [train].")
    ] = None,
    on_duplicate: Annotated[
        Literal["skip", "train"] | None, typer.Option(help="What to do with examples trained before.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key and job again give the same job, trained once.")
    ] = None,
    offline: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR", help="Train this directory now, without a server or worker."),
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Train the served model on examples.

    A line is {"messages": [...]}, {"prompt", "completion"} or {"context_ids", "continuation_ids"}; or a
    pair (chosen, rejected), a group (completions, rewards) or a labelled answer behind such a context.
    """
    options = _options(
        lr=lr,
        epochs=epochs,
        schedule=schedule,
        weight_decay=weight_decay,
        rank=rank,
        max_steps=max_steps,
        on_duplicate=on_duplicate,
        accumulate_steps=accumulate_steps,
        loss=loss,
        beta=beta,
        clip=clip[0] if clip and len(clip) == 1 else clip or None,
        kl_to_reference=kl_to_reference,
        target_probability=target_probability,
        embeddings=embeddings,
    )
    config = load_config(config_file)
    model_dir = check_model_dir(offline) if offline else None
    request = TrainRequest(read_examples(file), options)
    if model_dir is not None:
        job = _train_offline(model_dir, request, config, config_file)
    else:
        job = asyncio.run(_submit(request, idempotency_key, wait, config))
    if as_json:
        print_json(job)
    else:
        print(describe_job(job))
        for note in [] if offline else job.notes:  # offline they were said before the first step
            say(note)
    raise typer.Exit(1 if job.state in FAILED_STATES else 0)


def _options(**given: Any) -> TrainOptions:
    """Raises UserError whose field is the flag."""
    try:
        return convert({name: value for name, value in given.items() if value is not None}, TrainOptions)
    except UserError as error:
        flag = f"--{error.field.replace('_', '-')}" if error.field else None
        raise UserError(error.message, field=flag, code=error.code) from None


async def _submit(request: TrainRequest, idempotency_key: str | None, wait: bool, config: Config) -> JobInfo:
    from apollo_ipc.wire.client import WorkerClient

    async with WorkerClient(config.socket_path, "cli") as client:
        submit = Submit("", msgspec.json.encode(request), idempotency_key or uuid.uuid4().hex)
        try:
            with progress(f"handing over {len(request.examples)} examples"):
                job = (await client.request(submit, timeout_s=SUBMIT_TIMEOUT_S)).job
        except NotReady as error:
            if error.code != "not_delivered":
                say(f"it may be queued; to send it again safely: --idempotency-key {submit.idempotency_key}")
            raise
        assert job is not None
        if not wait or job.state in ENDED_STATES:
            return job
        try:
            with progress(job.state) as doing:
                async with aclosing(client.watch(job.job_id, silence_s=WORKER_AWAY_S)) as events:
                    async for job, _ in events:
                        doing(job.state, job.steps_done, job.num_steps, note=_loss(job.loss_last))
        except (KeyboardInterrupt, asyncio.CancelledError):
            say(f"job {job.job_id} goes on without us; to stop it: apollo-ipc cancel {job.job_id}")
            raise
    return job


def _train_offline(
    model_dir: Path, request: TrainRequest, config: Config, config_file: Path | None
) -> JobInfo:
    """Runs apollo_worker.commands.offline, which writes JSON lines: {"note"}, for each step
    {"step", "num_steps", "loss"}, then {"job": ...} or {"error": ...}. Raises ApolloError with what it
    said and its exit status."""
    # The request may be larger than a command line, and no copy of it shall stay on the disk.
    command = [sys.executable, "-m", "apollo_worker.commands.offline", str(model_dir), "/dev/stdin"]
    environment = worker_environment(config, config_file)
    job = error = None
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as trainer,
        progress("loading the model") as doing,
    ):
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        with trainer.stdin:
            trainer.stdin.write(msgspec.json.encode(request))
        for line in trainer.stdout:
            event = msgspec.json.decode(line)
            if "job" in event:
                job = msgspec.convert(event["job"], JobInfo)
            elif "error" in event:
                error = ApolloError(**event["error"])
            elif "note" in event:
                say(event["note"])
            else:
                step, num_steps, loss = event["step"], event["num_steps"], _loss(event["loss"])
                doing("training", step, num_steps, note=loss)
                if step == num_steps:
                    doing("writing the checkpoint", note=loss)
    if trainer.returncode == 0 and job is not None:
        return job
    error = error or ApolloError(
        "training ended before its time; what it said is above", code="offline_failed"
    )
    error.exit_code = trainer.returncode if trainer.returncode > 0 else 1
    raise error


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"loss {loss:.4g}"
