"""`apollo-ipc teach FILE`: facts that the served model shall know, and be examined on."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from apollo_curation.settings import load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, print_json
from apollo_ipc.errors import UserError

if TYPE_CHECKING:
    from apollo_curation.teach.teach import TeachReport

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def teach(
    file: Annotated[
        str, typer.Argument(help='JSON lines of {"question", "answer", "statement"?, "key"?}; -: stdin.')
    ],
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, help="Passes over a fact's variants in a round.")
    ] = 2,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds at most.")] = 3,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 1e-4,
    min_known: Annotated[
        float,
        typer.Option("--min-known", min=0, max=1, help="Share of the examination that has to be right."),
    ] = 0.5,
    max_rise: Annotated[
        float, typer.Option("--max-rise", help="Nats a token that general answers may lose.")
    ] = 0.3,
    max_hits: Annotated[
        float, typer.Option("--max-hits", min=0, max=1, help="Share of near misses that may name the fact.")
    ] = 0.5,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Teach facts to the served model, in several forms each; its general answers and near misses are held as
    they are, and it is examined before and after. Exit status 1: the weights of before are back."""
    from apollo_curation.chat_client import learner
    from apollo_curation.teach.facts import parse_facts
    from apollo_curation.teach.job import Mix
    from apollo_curation.teach.served import ServedLearner
    from apollo_curation.teach.teach import Limits, teach
    from apollo_curation.train_client import TrainClient

    config = load_curation_config(config_file)
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}", field="FILE") from None
    facts = parse_facts(text)
    limits = Limits(min_known, max_rise, max_hits, rounds)
    say = (lambda _: None) if as_json else console.print
    with closing(learner(config)) as chat, closing(TrainClient(config)) as training:
        mix = Mix(epochs=epochs, lr=lr)
        report = teach(facts, ServedLearner(chat), training, mix=mix, limits=limits, say=say)
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        _print(report)
    raise typer.Exit(0 if report.state == "applied" else 1)


def _print(report: TeachReport) -> None:
    from rich.table import Table

    table = Table("fact", "taught", "paraphrased", "reversed", "near misses that name it")
    for one in report.facts:
        groups = (one.paraphrased, one.reversed, one.not_it)
        counts = [f"{sum(answer.is_right for answer in group)} of {len(group)}" for group in groups]
        table.add_row(one.fact.question, "known" if one.taught.is_right else one.taught.after[:60], *counts)
    console.print(table)
    console.print(f"general answers lose {report.rise:.3f} nats a token; {report.known:.0%} is right")
    console.print(report.state + (f": {report.reason}" if report.reason else ""), markup=False)
