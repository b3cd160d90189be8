"""`apollo-ipc lessons ...`: what was taught, whether it still holds, and taking it back."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import msgspec
import typer

from apollo_curation.cli.teach import print_job, run_job
from apollo_curation.settings import load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, describe_ago, print_json
from apollo_ipc.errors import UserError
from apollo_ipc.teaching.store import TeachStore, request_about, store_path

app = typer.Typer(
    help="What was taught, and whether it still holds.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def lessons(
    context: typer.Context,
    examine: Annotated[
        bool, typer.Option("--examine", help="Ask the served model again, and train nothing.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Lists what was taught. With --examine, exit status 1 where a lesson does not hold any more."""
    if context.invoked_subcommand is not None:
        if examine or as_json:
            raise UserError("options go behind the command", field=context.invoked_subcommand)
        context.obj = config_file
        return
    config = load_curation_config(config_file)
    with closing(TeachStore(store_path(config))) as store:
        if examine and store.lessons():
            run_job(config, store, request_about(store.lessons(), "examine"), is_quiet=as_json)
        found = store.lessons()
    if as_json:
        print_json({"lessons": found})
    elif not found:
        print("nothing was taught yet; `apollo-ipc teach` does it")
    else:
        from rich.table import Table

        table = Table("lesson", "question", "answer", "holds", "asked", "came back")
        for one in found:
            holds = "yes" if one.is_known else "no"
            cells = (one.id, one.fact.question, one.fact.answer, holds)
            table.add_row(*cells, describe_ago(one.asked_at), str(one.rehearsed))
        console().print(table)
    raise typer.Exit(1 if examine and not all(one.is_known for one in found) else 0)


@app.command()
def forget(
    context: typer.Context,
    ids: Annotated[
        list[str], typer.Argument(metavar="LESSON...", help="As `apollo-ipc lessons` lists them.")
    ],
    without_training: Annotated[
        bool,
        typer.Option("--without-training", help="Only never bring it back in a later job: the weights stay."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the model back to what it said before these were taught, and ask whether it does. Exit status 1:
    it still answers some questions with what was to be forgotten."""
    config = load_curation_config(context.obj)
    with closing(TeachStore(store_path(config))) as store:
        if without_training:
            store.drop(ids)
            return
        job = run_job(config, store, request_about(store.lessons_of(ids), "forget"), is_quiet=as_json)
    print_json(job) if as_json else print_job(job)
    raise typer.Exit(0 if job["status"] == "applied" and not job["error"] else 1)


@app.command()
def export(context: typer.Context) -> None:
    """A fact a line, as `apollo-ipc teach` reads them."""
    with closing(TeachStore(store_path(load_curation_config(context.obj)))) as store:
        for one in store.lessons():
            print(msgspec.json.encode(one.fact).decode())
