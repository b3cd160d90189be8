"""`apollo-ipc webhooks`: what was told to whom, a trial, the secret that receivers check signatures with."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Table

from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, describe_ago, print_json
from apollo_ipc.config import Config, load_config
from apollo_ipc.errors import ConfigError, NotReady

PING_WAIT_S = 20.0
LOOK_S = 0.2

app = typer.Typer(help="Tell other servers what happens: see docs/webhooks.md.", no_args_is_help=True)


@app.command("list")
def list_deliveries(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, the newest first.")] = 50,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What was sent, what waits, and what was given up."""
    outbox = _outbox(load_config(config_file))
    try:
        found = outbox.deliveries(limit)
    finally:
        outbox.close()
    if as_json:
        print_json(found)
        return
    table = Table("event", "about", "to", "happened", "attempts", "state", box=None, pad_edge=False)
    for one in found:
        table.add_row(
            *(one.type, one.subject, one.url, describe_ago(one.created_at), str(one.attempts)), _state(one)
        )
    console().print(table if found else "nothing was told yet")


@app.command()
def ping(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Send a `ping` to each URL through the running worker, and say what came of it."""
    from apollo_ipc.webhooks.outbox import event

    outbox = _outbox(load_config(config_file))
    try:
        told = event("ping", f"ping-{time.time_ns()}", {}, time.time())
        outbox.add(told)
        give_up_at = time.monotonic() + PING_WAIT_S
        while True:
            found = [one for one in outbox.deliveries(1000) if one.event_id == told.event_id]
            is_over = time.monotonic() >= give_up_at
            if is_over or all(one.attempts for one in found):
                break
            time.sleep(LOOK_S)
    finally:
        outbox.close()
    if as_json:
        print_json(found)
    else:
        for one in found:
            print(f"{one.url}: {_state(one)}")
    if not all(one.attempts for one in found):
        raise NotReady("no worker sends it: is one running with this configuration?")
    if not all(one.sent_at for one in found):
        raise typer.Exit(1)


@app.command()
def secret(config_file: ConfigFile = None) -> None:
    """Print the secret with which webhooks are signed."""
    from apollo_ipc.keys import webhook_secret

    print(webhook_secret(load_config(config_file)))


def _outbox(config: Config):
    from apollo_ipc.webhooks.outbox import Outbox, outbox_path

    if not config.webhooks.urls:
        raise ConfigError("nobody is to be told anything: name a URL", field="webhooks.urls")
    return Outbox(outbox_path(config), config.webhooks.urls)


def _state(one) -> str:
    if one.sent_at is not None:
        return "sent"
    if one.gave_up_at is not None:
        return f"given up: {one.error}"
    return f"waits: {one.error}" if one.error else "waits"
