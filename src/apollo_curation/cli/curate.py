"""`apollo-ipc curate ...`: from what happened to what is learned."""

from __future__ import annotations

from typing import Annotated

import typer

from apollo_curation.cli import curate_dream, curate_flag, curate_input, curate_review, curate_train
from apollo_curation.cli.curate_train import stop_by_signal
from apollo_curation.settings import load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import print_json, say

app = typer.Typer(
    help="From what happened to what is learned: transcripts in, training jobs out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(curate_input.read)
app.command()(curate_input.strip)
app.command()(curate_flag.flag)
app.command()(curate_review.judge)
app.command()(curate_review.score)
app.command("moments")(curate_review.list_moments)
app.command()(curate_review.show)
app.command()(curate_review.review)
app.command()(curate_review.approve)
app.command()(curate_review.reject)
app.command()(curate_train.train)
app.command()(curate_train.run)
app.command()(curate_train.batches)
app.command()(curate_train.status)
app.command()(curate_dream.dream)
app.command()(curate_dream.feed)
app.command()(curate_dream.dreams)


@app.command()
def night(
    is_auto: Annotated[
        bool,
        typer.Option("--auto", help="Approve what is noticed tonight, from curation.auto_confidence on."),
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The unattended run: read, judge, dream, train, watch the quality, write checkpoint and report.

    Exit status 1 where the quality was broken or training failed, 69 where a server stayed away; the next
    night goes on with what is left.
    """
    from apollo_curation.night import run_night
    from apollo_curation.store import Store, store_path

    config = load_curation_config(config_file)
    with stop_by_signal() as stop, Store(store_path(config)) as store:
        report = run_night(config, store, is_auto=is_auto, stop=stop, say=say)
    if as_json:
        print_json(report)
    else:
        print(f"{report.ended}; report: {report.html}")
    raise typer.Exit(report.exit_code)
