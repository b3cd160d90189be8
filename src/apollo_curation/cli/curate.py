"""`apollo-ipc curate ...`: from what happened to what is learned."""

from __future__ import annotations

import typer

from apollo_curation.cli import curate_input, curate_review, curate_status, curate_train

app = typer.Typer(
    help="From what happened to what is learned: transcripts in, training jobs out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
for command in (
    curate_input.strip,
    curate_input.flag,
    curate_review.judge,
    curate_review.calibrate,
    curate_review.review,
    curate_review.approve,
    curate_review.reject,
    curate_train.train,
    curate_train.run,
    curate_train.dream,
    curate_train.night,
    curate_status.status,
):
    app.command()(command)
