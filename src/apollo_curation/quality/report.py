"""The history as one page of HTML: no script, nothing fetched, every text from outside escaped."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.printable import printable
from apollo_curation.quality.charts import Mark, Series, line_chart, sparkline
from apollo_curation.quality.history import Measurement, QualityHistory
from apollo_curation.quality.thresholds import find_drift
from apollo_curation.store import Store
from apollo_curation.training.batch_table import BatchTable, TrainingBatch

MAX_MEASUREMENTS = 200  # on a page, the newest ones
MAX_CANARY_COLUMNS = 20
MAX_BATCHES = 200
MAX_MOMENTS_SHOWN = 12  # of one batch, with their texts
MAX_CHARACTERS = 600  # of one text


def write_html(path: Path, store: Store) -> None:
    """Replaces `path` at once; readable by its owner only, as it quotes transcripts. Raises OSError."""
    page = _environment().get_template("report.html").render(gather(store))
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(file, "wb") as out:
            out.write(page.encode("utf-8", "replace"))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def gather(store: Store) -> dict[str, Any]:
    """Everything that the template shows."""
    history = QualityHistory(store)
    everything = history.list()
    measurements = everything[-MAX_MEASUREMENTS:]
    batches = BatchTable(store).list()
    shown = batches[-MAX_BATCHES:]
    last = measurements[-1] if measurements else None
    return {
        "written_at": time.time(),
        "measurements": measurements,
        "last": last,
        "num_left_out": len(everything) - len(measurements),
        "first_at": everything[0].at if everything else None,
        "drift": find_drift(last, everything) if last else {},
        "reference": _find(everything, last.against) if last else None,
        "breaches": [(one, breach) for one in measurements for breach in one.breaches],
        "restores": [one for one in measurements if one.restored_version is not None],
        "heldout_chart": _heldout_chart(measurements) if measurements else None,
        "categories": _categories(measurements),
        "canaries": _canary_rows(measurements[-MAX_CANARY_COLUMNS:]),
        "canary_columns": measurements[-MAX_CANARY_COLUMNS:],
        "batches": [_batch_view(batch, measurements, Moments(store)) for batch in reversed(shown)],
        "num_batches_left_out": len(batches) - len(shown),
        "num_trained": sum(batch.num_trained for batch in batches if batch.state == "trained"),
        "num_undone": sum(batch.state == "undone" for batch in batches),
    }


def _heldout_chart(measurements: list[Measurement]) -> Markup:
    series = [
        Series(clean(category, 18), [_loss(one, category) for one in measurements])
        for category in _categories(measurements)
    ]
    ticks, day = [], ""
    for one in measurements:
        at = time.localtime(one.at)
        is_new, day = time.strftime("%d %b", at) != day, time.strftime("%d %b", at)
        ticks.append(f"{version(one)}\n{day if is_new else time.strftime('%H:%M', at)}")
    marks = []
    for i, one in enumerate(measurements):
        if one.breaches:
            marks.append(Mark(i, "breach", "breach" if one.action is None else _ACTIONS[one.action]))
        elif one.restored_version is not None:
            marks.append(Mark(i, "restore", f"v{one.restored_version} is back"))
        elif one.label == "good":
            marks.append(Mark(i, "accepted", "accepted"))
    during = [i for i, one in enumerate(measurements) if one.label == "during"]
    num_breaches = sum(bool(one.breaches) for one in measurements)
    description = (
        f"{len(series)} categories over {len(measurements)} measurements, {num_breaches} with a breach; the "
        "values are in the table below"
    )
    return line_chart("Held-out loss in nats a token, by category", description, series, ticks, marks, during)


_ACTIONS = {
    "stopped": "stopped",
    "restoring": "breach",
    "restored": "breach",
    "not_restored": "not restored",
}


def _categories(measurements: list[Measurement]) -> list[str]:
    """In the order in which they were first seen: a category keeps its colour."""
    return list(dict.fromkeys(category for one in measurements for category in one.losses))


def _canary_rows(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """A row for each canary, with its result in each measurement or None where it was not asked."""
    by_measurement = [{result.name: result for result in one.canaries} for one in measurements]
    names = dict.fromkeys(name for results in by_measurement for name in results)
    rows = []
    for name in names:
        results = [results.get(name) for results in by_measurement]
        newest = next(result for result in reversed(results) if result is not None)
        rows.append({"name": name, "category": newest.category, "results": results, "newest": newest})
    return rows


def _batch_view(batch: TrainingBatch, measurements: list[Measurement], moments: Moments) -> dict[str, Any]:
    taught = moments.of_batch(batch.batch_id)
    curve = batch.job.loss_history if batch.job else None
    before = [one for one in measurements if one.at <= batch.created_at and one.label != "during"]
    after = [one for one in measurements if batch.ended_at is not None and one.at >= batch.ended_at]
    title = f"Training loss of {batch.batch_id}"
    known = [loss for loss in curve or [] if loss is not None]
    described = f"{len(curve or [])} steps" + (f", from {known[0]:.4f} to {known[-1]:.4f}" if known else "")
    return {
        "batch": batch,
        "before": before[-1] if before else None,
        "after": after[0] if after else None,
        "kinds": Counter(moment.kind for moment in taught).most_common(),
        "sources": Counter(moment.source.path for moment in taught).most_common(),
        "moments": [_moment_view(moment) for moment in taught[:MAX_MOMENTS_SHOWN]],
        "num_more": max(0, len(taught) - MAX_MOMENTS_SHOWN),
        "num_steps": len(curve or []),
        "first": known[0] if known else None,
        "last": known[-1] if known else None,
        "chart": sparkline(title, described, curve) if known and curve else None,
    }


def _moment_view(moment: Moment) -> dict[str, Any]:
    asked = moment.context[-1] if moment.context else None
    return {
        "moment": moment,
        "role": asked.role if asked else "",
        "asked": asked.content if asked else "",
        "answer": moment.answer.content if moment.answer else "",
        "calls": [call.get("function") for call in (moment.answer and moment.answer.tool_calls) or []],
    }


def _find(measurements: list[Measurement], measurement_id: int | None) -> Measurement | None:
    return next((one for one in measurements if one.measurement_id == measurement_id), None)


def _loss(measurement: Measurement, category: str) -> float | None:
    loss = measurement.losses.get(category)
    return loss.loss if loss else None


def clean(text: object, limit: int = MAX_CHARACTERS) -> str:
    return printable(text, limit)


def clock_time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def version(measurement: Measurement) -> str:
    return "-" if measurement.weight_version is None else f"v{measurement.weight_version}"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def plural(num: int, noun: str) -> str:
    """`1 batch`, `2 batches`."""
    return f"{num} {noun}" if num == 1 else f"{num} {noun}{'es' if noun.endswith('ch') else 's'}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.1%}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = (clean, clock_time, version, number, plural, percent)
    environment.filters.update({function.__name__: function for function in own})
    return environment
