"""`apollo-ipc quality ...`: the held-out set and the canaries, measured now, over time, and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from apollo_curation.settings import CurationConfig, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, describe_ago, print_json
from apollo_ipc.errors import UserError
from apollo_ipc.process.progress import progress

if TYPE_CHECKING:
    from apollo_curation.quality.history import Measurement
    from apollo_curation.quality.monitor import QualityReport

WORKER_PATIENCE_S = 3.0  # only the weight version is asked of it; without a worker it is left away

app = typer.Typer(
    help="Whether the model has become worse while it learned.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command()
def check(
    is_accepted: Annotated[
        bool, typer.Option("--accept", help="Later checks are held against this one, whatever it shows.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure now. Exit status 1 where it is worse than the last good measurement by more than is allowed."""
    from apollo_curation.chat_client import judging, learner
    from apollo_curation.quality.monitor import Monitor
    from apollo_curation.store import Store, store_path
    from apollo_curation.train_client import TrainClient

    config = load_curation_config(config_file)
    with Store(store_path(config)) as store, progress("asking the served model what is held out"):
        judge = judging(config) if config.judge.enabled else None
        training = TrainClient(_impatient(config))
        report = Monitor(config, store, learner(config), judge, training).check(
            "good" if is_accepted else "scheduled"
        )
    if as_json:
        print_json({"ok": report.ok, **msgspec.to_builtins(report)})
    else:
        _print_report(report)
    raise typer.Exit(0 if report.ok or is_accepted else 1)


@app.command()
def history(
    limit: Annotated[int, typer.Option("--limit", min=1, help="The newest so many.")] = 50,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What was measured, the oldest first; losses in nats a token."""
    from rich.table import Table

    from apollo_curation.quality.history import QualityHistory
    from apollo_curation.quality.report import clean, clock_time, number, version
    from apollo_curation.store import Store, store_path

    with Store(store_path(load_curation_config(config_file))) as store:
        measurements = QualityHistory(store).list(limit)
    if as_json:
        print_json({"measurements": measurements})
        return
    if not measurements:
        print("nothing was measured yet; `apollo-ipc quality check` does it now")
        return
    categories = list(dict.fromkeys(name for one in measurements for name in one.losses))
    table = Table(
        "no",
        "time",
        "when",
        "version",
        *map(clean, categories),
        "canaries",
        "notes",
        box=None,
        pad_edge=False,
    )
    for one in measurements:
        losses = [one.losses.get(name) for name in categories]
        notes = [breach.sentence for breach in one.breaches] + ([one.action] if one.action else [])
        notes += [f"version {one.restored_version} restored"] if one.restored_version is not None else []
        table.add_row(
            str(one.measurement_id),
            clock_time(one.at),
            one.label,
            version(one),
            *(number(loss.loss) if loss else "" for loss in losses),
            _describe_canaries(one),
            clean("; ".join(notes)),
        )
    console().print(table)


@app.command()
def report(
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="Where the page is written.")],
    config_file: ConfigFile = None,
) -> None:
    """The history as one self-contained page: curves, canaries, versions, and what was trained between."""
    from apollo_curation.quality.report import write_html
    from apollo_curation.store import Store, store_path

    with Store(store_path(load_curation_config(config_file))) as store:
        try:
            write_html(html, store)
        except OSError as error:
            raise UserError(f"cannot write {html}: {error.strerror}", field="--html") from None
    print(f"{html} is written")


def _impatient(config: CurationConfig) -> CurationConfig:
    curation = msgspec.structs.replace(
        config.curation, patience_s=min(WORKER_PATIENCE_S, config.curation.patience_s)
    )
    return msgspec.structs.replace(config, curation=curation)


def _print_report(report: QualityReport) -> None:
    from rich.table import Table

    from apollo_curation.quality.report import clean, number, percent

    now, before = report.measurement, report.against
    table = Table("category", "before", "now", "change", "since first", "tokens", box=None, pad_edge=False)
    for category, loss in now.losses.items():
        old = before.losses.get(category) if before else None
        old = old if old and old.examples_hash == loss.examples_hash else None
        change = loss.loss / old.loss - 1 if old and old.loss and loss.loss is not None else None
        table.add_row(
            clean(category),
            number(old.loss if old else None),
            number(loss.loss),
            percent(change),
            percent(report.drift.get(category)),
            str(loss.num_tokens),
        )
    console().print(table)
    for canary in now.canaries:
        if canary.passed is not True:
            how = "fails" if canary.passed is False else "not judged"
            print(clean(f"canary {canary.name}: {how}: {canary.reason}"))
    print(f"canaries: {_describe_canaries(now)}")
    for breach in report.breaches:
        print(f"BREACH {clean(breach.sentence)}")
    if report.overlap:
        print(f"{len(report.overlap)} moments are in the held-out set, so it tells nothing about them")
    against = f"measurement {before.measurement_id}, {describe_ago(before.at)}" if before else "nothing yet"
    print(f"{'within the limits' if report.ok else 'worse than allowed'} (held against {against})")


def _describe_canaries(measurement: Measurement) -> str:
    text = f"{measurement.num_passed} of {len(measurement.canaries)} pass"
    return f"{text}, {measurement.num_not_judged} not judged" if measurement.num_not_judged else text
