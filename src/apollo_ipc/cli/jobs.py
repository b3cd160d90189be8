"""`apollo-ipc status`, `jobs`, `cancel`: what the worker does, asked over ZMQ."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.live import Live

from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import (
    console,
    describe_job,
    jobs_table,
    print_json,
    print_json_line,
    status_table,
)
from apollo_ipc.config import Config, load_config
from apollo_ipc.errors import NotReady
from apollo_ipc.wire.messages import CancelJob, GetStatus, ListJobs
from apollo_ipc.wire.replies import JobState

WATCH_INTERVAL_S = 1.0


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, until Ctrl-C.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What the training worker is doing."""
    from apollo_ipc.wire.client import call

    config = load_config(config_file)
    if watch:
        asyncio.run(_watch(config, as_json))
        return
    status = call(config.socket_path, GetStatus("")).status
    assert status is not None
    if as_json:
        print_json(status)
    else:
        console().print(status_table(status))


async def _watch(config: Config, as_json: bool) -> None:
    from apollo_ipc.wire.client import WorkerClient

    async with WorkerClient(config.socket_path, "cli") as client:
        with Live(console=console(stderr=as_json), auto_refresh=False) as live:
            while True:
                try:
                    status = (await client.request(GetStatus(""))).status
                    assert status is not None
                    if as_json:
                        print_json_line(status)
                    else:
                        live.update(status_table(status), refresh=True)
                except NotReady as error:  # it may come (back)
                    live.update(error.message, refresh=True)
                await asyncio.sleep(WATCH_INTERVAL_S)


def list_jobs(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, the newest first.")] = 50,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The newest training jobs."""
    from apollo_ipc.wire.client import call

    jobs = call(load_config(config_file).socket_path, ListJobs("", limit, state)).jobs
    assert jobs is not None
    if as_json:
        print_json(jobs)
    else:
        console().print(jobs_table(jobs) if jobs else "no jobs")


def cancel(
    job_id: Annotated[str, typer.Argument(metavar="JOB_ID", help="As `apollo-ipc jobs` shows it.")],
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a queued job, or a running one after its present step."""
    from apollo_ipc.wire.client import call

    job = call(load_config(config_file).socket_path, CancelJob("", job_id)).job
    assert job is not None
    if as_json:
        print_json(job)
    else:
        print(describe_job(job))
