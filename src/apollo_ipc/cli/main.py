"""The commands by name, and what a failure looks like: one sentence, an exit status, no traceback."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from apollo_ipc.cli import (
    checkpoint,
    follow,
    jobs,
    plan,
    preview,
    processes,
    serve,
    train,
    versions,
    webhooks,
)
from apollo_ipc.cli.output import print_error
from apollo_ipc.errors import ApolloError

# Options that a command does not know are handed on to the program behind it.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

COMMAND_GROUP = "apollo_ipc.commands"  # of entry points: name -> a typer.Typer of a client's own


class Commands(TyperGroup):
    """Our commands, and those that installed packages mount. Such a package is imported when its command is
    called or described; one that is broken costs nothing but its own commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_mounted().names)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is not None or cmd_name not in _mounted().names:
            return found
        try:
            mounted: Any = typer.main.get_command(_mounted()[cmd_name].load())
        except Exception as error:  # whatever is wrong there, it is not ours
            return _cannot_load(cmd_name, error)
        mounted.name = cmd_name
        return mounted


def _mounted() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=COMMAND_GROUP)


def _cannot_load(name: str, error: Exception) -> Any:
    """A command in its place, which says why."""
    broken = typer.Typer(add_completion=False)

    @broken.command(name, context_settings=PASS_ON, help=f"Not available: {error}")
    def _say() -> None:
        raise ApolloError(f"`{name}` is not available: {type(error).__name__}: {error}", code="not_available")

    return typer.main.get_command(broken)


app = typer.Typer(
    name="apollo-ipc",
    cls=Commands,
    help="Full-weight fine-tuning of a model while vLLM serves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(context_settings=PASS_ON)(serve.serve)
app.command(context_settings=PASS_ON)(follow.follow)
app.command()(processes.worker)
app.command()(train.train)
app.command()(jobs.status)
app.command("jobs")(jobs.list_jobs)
app.command()(jobs.cancel)
app.add_typer(checkpoint.app, name="checkpoint")
checkpoint.app.command()(versions.history)
checkpoint.app.command()(versions.diff)
checkpoint.app.command()(versions.restore)
checkpoint.app.command()(versions.pin)
checkpoint.app.command()(versions.forget)
checkpoint.app.command(context_settings=PASS_ON)(versions.snapshot)
app.command(context_settings=PASS_ON)(processes.check)
app.command()(plan.plan)
app.command()(preview.preview)
app.command()(processes.key)
app.command()(processes.demo)
app.add_typer(webhooks.app, name="webhooks")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"apollo-ipc {importlib.metadata.version('apollo-ipc')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Exit status: 0 done, 1 failed, 2 wrong usage or input, 69 not there yet, 75 already running, 78 wrong
    configuration, 130 interrupted."""
    try:
        app()
    except ApolloError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
