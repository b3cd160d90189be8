"""`apollo-ipc teach FILE`: facts that the served model shall know, and be examined on."""

from __future__ import annotations

import sys
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from apollo_curation.settings import CurationConfig, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, print_json
from apollo_ipc.errors import UserError
from apollo_ipc.process.progress import progress
from apollo_ipc.teaching.facts import facts_of_document, parse_facts
from apollo_ipc.teaching.store import TeachOptions, TeachRequest, TeachStore, store_path

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def teach(
    file: Annotated[
        str,
        typer.Argument(
            help='A fact a line: a sentence, or {"statement"?, "question"?, "answer"?, "key"?}; -: stdin.'
        ),
    ],
    document: Annotated[
        bool, typer.Option("--document", help="The file is a text: each sentence is a fact where it can be.")
    ] = False,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, max=20, help="Rounds at most [3].")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    min_known: Annotated[
        float | None,
        typer.Option("--min-known", min=0, max=1, help="Share of what is asked that has to be right [0.5]."),
    ] = None,
    max_rise: Annotated[
        float | None, typer.Option("--max-rise", help="Nats a token that general answers may lose [0.3].")
    ] = None,
    max_hits: Annotated[
        float | None,
        typer.Option("--max-hits", min=0, max=1, help="Share of near misses that may name the fact [0.5]."),
    ] = None,
    writer: Annotated[
        Literal["auto", "rules", "model"] | None,
        typer.Option(
            "--writer",
            help="Who makes the forms of a fact: rules alone, or the served model too, where its own answers "
            "confirm them; auto: by what the model can do [auto].",
        ),
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Teach facts to the served model, in several forms each; its general answers and near misses are held as
    they are, and it is examined before and after. Killed and called again with the same file, it goes on.
    Exit status 1: they were not taught, and the weights of before are back where that was possible."""
    from apollo_ipc.teaching.store import TeachRequest, TeachStore

    config = load_curation_config(config_file)
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}", field="FILE") from None
    is_written, notes = writer == "model", []
    if document:
        facts, notes = facts_of_document(text, is_written=is_written)
    else:
        facts = parse_facts(text, is_written=is_written)
    given = {"rounds": rounds, "lr": lr, "min_known": min_known, "max_rise": max_rise, "max_hits": max_hits}
    given_options = {k: v for k, v in (given | {"writer": writer}).items() if v is not None}
    options = msgspec.convert(given_options, TeachOptions)
    request = TeachRequest(facts, options, notes=notes)
    for note in [] if as_json else notes:
        console().print(note)
    with closing(TeachStore(store_path(config))) as store:
        job = run_job(config, store, request, is_quiet=as_json)
    print_json(job) if as_json else print_job(job)
    raise typer.Exit(0 if job["status"] == "applied" and not job["error"] else 1)


def run_job(
    config: CurationConfig, store: TeachStore, request: TeachRequest, *, is_quiet: bool
) -> dict[str, Any]:
    """The job when it has ended, as it is shown. Called again after a kill, it goes on."""
    from apollo_curation.teach.run import wait_for

    digest = blake2b(msgspec.json.encode(request), digest_size=32).digest()
    job = store.admit(request, digest, client_key=None, is_retry=True)
    with progress(f"{job.id}: {job.phase}") as doing:

        def tell(text: str) -> None:
            if not is_quiet:
                print(text)
            doing(text)

        return wait_for(config, store, job.id, tell).shown()


def print_job(job: dict[str, Any]) -> None:
    from rich.table import Table

    if report := job["report"]:
        table = Table("fact", "taught", "paraphrased", "reversed", "near misses that name it")
        for one in report["facts"]:
            groups = (one["paraphrased"], one["reversed"], one["not_it"])
            counts = [f"{sum(answer['is_right'] for answer in group)} of {len(group)}" for group in groups]
            taught = one["taught"]
            said = "known" if taught["is_right"] else taught["after"][:60]
            table.add_row(one["fact"]["question"], said, *counts)
        console().print(table)
        console().print(
            f"general answers lose {report['rise']:.3f} nats a token; {report['known']:.0%} is right"
        )
        for statement in report["left_out"]:
            console().print(f"left out, no question was made of it: {statement}", markup=False)
        if writing := report["writing"]:
            console().print(said_of(writing), markup=False)
    console().print(job["status"] + (f": {job['error']}" if job["error"] else ""), markup=False)


def said_of(writing: dict[str, Any]) -> str:
    """Who made the forms, in a line."""
    if writing["source"] == "rules":
        return f"forms: {writing['reason'] or 'rules alone'}"
    dropped = ", ".join(f"{number} {why}" for why, number in writing["dropped"].items())
    told = f"forms: {writing['num_kept']} of the served model beside the rules' own"
    return (
        told
        + (f"; dropped: {dropped}" if dropped else "")
        + (f"; {writing['reason']}" * bool(writing["reason"]))
    )
