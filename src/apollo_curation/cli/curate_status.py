"""`apollo-ipc curate status`: all that curation remembers, as a whole or one by one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, get_args

import msgspec
import typer
from rich.table import Column, Table

from apollo_curation.cli.common import open_moments, short
from apollo_curation.settings import load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, describe_ago, describe_loss, print_json
from apollo_ipc.errors import UserError, nearest

if TYPE_CHECKING:
    from apollo_curation.dreams.table import Dream
    from apollo_curation.moments.moments import Moment
    from apollo_curation.training.batch_table import TrainingBatch

NUM_BATCHES_SHOWN = 10


def status(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Of moments, batches, dreams or seeds, which are shown whole."),
    ] = None,
    states: Annotated[
        list[str] | None, typer.Option("--state", help="List the moments in this state; again for more.")
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """How many moments are in each state, the last batches, and what is left of the window's budget; or the
    moments in a state; or what an ID stands for. The beginning of a moment's or dream's id is enough."""
    from apollo_curation.dreams.table import Dreams
    from apollo_curation.moments.moments import State
    from apollo_curation.training.batch_table import BatchTable

    for state in states or []:
        if state not in get_args(State):
            raise UserError(f"there is no {state!r}; {nearest(state, get_args(State))}", field="--state")
    config = load_curation_config(config_file)
    own = config.curation
    with open_moments(config) as (store, moments):
        batches, dreams = BatchTable(store), Dreams(store)
        found: list[Any] = []
        for one in ids or []:
            kind = one.partition("-")[0]
            if kind == "batch":
                found += [batches.get(one), *moments.of_batch(one)]
            elif kind in ("d", "s"):
                found += [dreams.get(one)] if kind == "d" else dreams.of_seed(one)
            else:
                found.append(moments.get(one))
        if states:
            found += moments.list(*states)  # pyright: ignore[reportArgumentType]
        if ids or states:
            _print_found(found, is_whole=bool(ids), as_json=as_json)
            return
        since = time.time() - own.window_s
        window = {
            "window_s": own.window_s,
            "num_trained": batches.num_trained(since),
            "limit": own.max_examples_per_window,
        }
        counts, seeds, last = moments.counts(), dreams.seeds(), batches.list()[::-1][:NUM_BATCHES_SHOWN]
    if as_json:
        print_json({"moments": counts, "seeds": seeds, "window": window, "batches": last})
        return
    for name, counted in (("moments", counts), ("seeds", seeds)):
        told = ", ".join(f"{num} {state.replace('_', ' ')}" for state, num in counted.items())
        if told or name == "moments":
            print(f"{name}: {told or 'none yet'}")
    hours = own.window_s / 3600
    print(f"window: {window['num_trained']} of {own.max_examples_per_window} examples in {hours:g} h")
    console().print(batches_table(last) if last else "no batches yet")


def _print_found(found: list[Any], *, is_whole: bool, as_json: bool) -> None:
    from apollo_curation.dreams.table import Dream
    from apollo_curation.moments.moments import Moment
    from apollo_curation.moments.review_view import print_view

    if as_json:
        print_json([_as_data(one) for one in found])
        return
    moments = [one for one in found if isinstance(one, Moment)]
    dreams = [one for one in found if isinstance(one, Dream)]
    batches = [one for one in found if not isinstance(one, Moment | Dream)]
    if batches:
        console().print(batches_table(batches))
    if dreams:
        console().print(dreams_table(dreams))
    for moment in moments if is_whole else []:
        print_view(console(), moment, whole=True)
    if not is_whole:
        console().print(moments_table(moments) if moments else "no moments")


def _as_data(one: Any) -> Any:
    lineage = getattr(one, "lineage", None)
    return msgspec.to_builtins(one) | ({} if lineage is None else {"lineage": lineage})


def describe_batch(batch: TrainingBatch) -> str:
    parts = [f"{batch.tier} batch {batch.batch_id}: {batch.state}", f"{len(batch.moment_ids)} examples"]
    if batch.num_held:
        parts.append(f"{batch.num_held} answers held beside")
    if batch.job is not None:
        if batch.num_known:
            parts.append(f"{batch.num_known} of them trained before")
        if loss := describe_loss(batch.job):
            parts.append(f"loss {loss}")
        if batch.job.weight_version is not None:
            parts.append(f"in weight version {batch.job.weight_version}")
    if batch.error:
        parts.append(batch.error)
    return ", ".join(parts)


def describe_dream(dream: Dream) -> str:
    parts = [f"dream {dream.dream_id} of seed {dream.seed_id} ({dream.topic})"]
    if dream.verdict is not None:
        parts.append(f"answered {'well' if dream.verdict.good else 'badly'}: {dream.verdict.reason}")
    if dream.state not in ("good", "open"):
        parts.append(f"{dream.state}{f' ({dream.reason})' if dream.reason else ''}")
    return ", ".join(parts)


def _table(whole: Iterable[str], *folding: str) -> Table:
    """Where room is short, the last columns fold."""
    return Table(*(Column(name, no_wrap=True) for name in whole), *folding, box=None, pad_edge=False)


def batches_table(found: list[TrainingBatch]) -> Table:
    table = _table(("batch", "tier", "state", "examples", "loss", "version", "made"), "error")
    for batch in found:
        job, made = batch.job, describe_ago(batch.created_at)
        loss = describe_loss(job) if job else ""
        version = str(job.weight_version) if job and job.weight_version is not None else ""
        own = (batch.batch_id, batch.tier, batch.state, str(len(batch.moment_ids)))
        table.add_row(*own, loss, version, made, batch.error or "")
    return table


def moments_table(found: list[Moment]) -> Table:
    from apollo_curation.moments.review_view import as_text
    from apollo_curation.printable import printable

    table = _table(("moment", "state", "kind", "sure", "surprise", "source"), "to be learned")
    for moment in found:
        text = short(printable(as_text(moment.answer))) or "(no answer yet)"
        surprise = "" if moment.surprise is None else f"{moment.surprise:.2f}"
        source, sure = printable(moment.source), f"{moment.confidence:.2f}"
        table.add_row(moment.moment_id, moment.state, moment.kind, sure, surprise, source, text)
    return table


def dreams_table(found: list[Dream]) -> Table:
    from apollo_curation.printable import printable

    table = _table(("dream", "varies", "seed", "round", "state", "answered", "batch", "made"), "situation")
    for one in found:
        verdict = "-" if one.verdict is None else "well" if one.verdict.good else "badly"
        made, text = describe_ago(one.created_at), short(printable(one.situation[-1].content))
        own = (one.dream_id, one.parent or "-", one.seed_id, str(one.round), one.state)
        table.add_row(*own, verdict, one.batch_id or "-", made, text)
    return table
