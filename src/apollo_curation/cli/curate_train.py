"""`apollo-ipc curate train | run | batches | status`: approved moments become training jobs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.table import Column, Table

from apollo_curation.settings import CurationConfig, TierName, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, describe_ago, print_json, print_json_line, say
from apollo_ipc.process.flag import Flag

if TYPE_CHECKING:
    from apollo_curation.moments.moments import Moment
    from apollo_curation.training.batch_table import Batch
    from apollo_curation.training.schedule import Learning, Trained

NUM_BATCHES_SHOWN = 5  # by `status`
TEXT_SHOWN = 80  # characters of an answer

TierChoice = Annotated[TierName | None, typer.Option("--tier", help="Only this tier [default: all three].")]


def train(
    tier: TierChoice = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many examples a tier.")] = None,
    is_dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and why the rest would not.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Choose among the approved moments, train them now, whatever the tier's schedule, and wait for it.

    Watched where quality.heldout is set. Exit status 1 where a batch did not train, or the model became worse
    than it may. Ctrl-C leaves the job running; the next start settles it.
    """
    from apollo_curation.quality.watch import QualityBroken, watched
    from apollo_curation.training.schedule import TIERS, Trained

    config = load_curation_config(config_file)
    tiers = (tier,) if tier else TIERS
    batches: list[Batch] = []
    turns: list[Trained] = []
    broken: QualityBroken | None = None
    with open_learning(config) as learning:
        if is_dry_run:
            turns = [Trained(one, learning.choose(one, limit)) for one in tiers]
            _print_choices(turns, as_json)
            return
        try:
            with watched(config, learning.store, learning.training) as each:
                batches += learning.batches.resume(each)
                for one in tiers:
                    if any(batch.state == "stopped" for batch in batches):
                        break
                    turns.append(learning.train(one, limit, each))
                    batches += [turns[-1].batch] if turns[-1].batch else []
        except QualityBroken as error:
            broken = error
    if as_json:
        print_json({"batches": batches, "tiers": [_as_data(turn) for turn in turns]})
    else:
        for batch in batches:
            print(describe_batch(batch))
        for turn in turns:
            _print_left(turn)
    if broken is not None:
        raise broken
    if any(batch.state != "trained" for batch in batches):
        raise typer.Exit(1)


def run(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Train continuous tiers as moments are approved, and idle ones while nobody asks the model; until Ctrl-C
    or SIGTERM. A job that runs then goes on, and is settled at the next start. With --json a line a batch."""
    from apollo_curation.chat_client import learner
    from apollo_curation.training import schedule
    from apollo_curation.training.idle import Idleness

    config = load_curation_config(config_file)
    with stop_by_signal() as stop, open_learning(config, stop) as learning:
        model = learner(config, stop)
        idleness = Idleness(model, config.curation.idle_s)
        try:
            schedule.run(
                learning,
                idleness,
                stop=stop,
                on_batch=lambda batch: print_json_line(batch) if as_json else say(describe_batch(batch)),
                on_away=lambda error: say(f"{error}; waiting for it"),
            )
        finally:
            model.close()


def batches(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 50,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What was trained: one line a batch of moments that became one job."""
    from apollo_curation.training.batch_table import BatchTable

    with _open_store(load_curation_config(config_file)) as store:
        found = BatchTable(store).list()[::-1][:limit]
    if as_json:
        print_json(found)
    else:
        console().print(batches_table(found) if found else "no batches")


def status(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """How many moments are in each state, the last batches, and what is left of the window's budget."""
    from apollo_curation.moments.moments import Moments
    from apollo_curation.training.batch_table import BatchTable

    config = load_curation_config(config_file)
    own = config.curation
    with _open_store(config) as store:
        table = BatchTable(store)
        counts = Moments(store).counts()
        last = table.list()[::-1][:NUM_BATCHES_SHOWN]
        num_trained = table.num_trained(time.time() - own.window_s)
    window = {"window_s": own.window_s, "num_trained": num_trained, "limit": own.max_examples_per_window}
    if as_json:
        print_json({"moments": counts, "window": window, "batches": last})
        return
    print(f"moments: {', '.join(f'{num} {state}' for state, num in counts.items()) or 'none yet'}")
    print(f"window:  {num_trained} of {own.max_examples_per_window} examples in {own.window_s / 3600:g} h")
    console().print(batches_table(last) if last else "no batches yet")


@contextmanager
def open_learning(config: CurationConfig, stop: Callable[[], bool] = lambda: False) -> Iterator[Learning]:
    """Store, batches and the training interface, by the configuration."""
    from apollo_curation.moments.moments import Moments
    from apollo_curation.train_client import Training
    from apollo_curation.training.batches import Batches
    from apollo_curation.training.schedule import Learning

    with _open_store(config) as store:
        moments, training = Moments(store), Training(config, stop)
        try:
            yield Learning(store, moments, Batches(store, moments, training, config, stop), training, config)
        finally:
            training.close()


@contextmanager
def stop_by_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come. A second Ctrl-C interrupts."""
    asked = Flag()

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_batch(batch: Batch) -> str:
    parts = [f"{batch.tier} batch {batch.batch_id}: {batch.state}", f"{batch.num_examples} examples"]
    if batch.num_skipped:
        parts.append(f"{batch.num_skipped} of them trained before")
    if loss := _describe_loss(batch):
        parts.append(f"loss {loss}")
    if batch.weight_version is not None:
        parts.append(f"in weight version {batch.weight_version}")
    if batch.error:
        parts.append(batch.error)
    return ", ".join(parts)


def batches_table(found: list[Batch]) -> Table:
    whole = ("batch", "tier", "state", "examples", "loss", "version", "made")
    table = Table(*(Column(name, no_wrap=True) for name in whole), "error", box=None, pad_edge=False)
    for batch in found:
        table.add_row(
            batch.batch_id,
            batch.tier,
            batch.state,
            str(batch.num_examples),
            _describe_loss(batch),
            "" if batch.weight_version is None else str(batch.weight_version),
            describe_ago(batch.created_at),
            batch.error or "",
        )
    return table


def _describe_loss(batch: Batch) -> str:
    if batch.loss_last is None:
        return ""
    if batch.loss_first is None or batch.steps_done < 2:
        return f"{batch.loss_last:.4g}"
    return f"{batch.loss_first:.4g} -> {batch.loss_last:.4g}"


def _open_store(config: CurationConfig) -> Any:
    from apollo_curation.store import Store, store_path

    return Store(store_path(config))


def _print_choices(turns: list[Trained], as_json: bool) -> None:
    if as_json:
        print_json({"tiers": [_as_data(turn) for turn in turns]})
        return
    for turn in turns:
        print(f"{turn.tier}: {len(turn.choice.chosen)} would be trained")
        for moment in turn.choice.chosen:
            print(f"  {_describe_moment(moment)}")
        for reason, moments in turn.choice.left.items():
            print(f"{turn.tier}: {len(moments)} left, {reason}")
            for moment in moments:
                print(f"  {_describe_moment(moment)}")


def _print_left(turn: Trained) -> None:
    left = ", ".join(f"{len(moments)} {reason}" for reason, moments in turn.choice.left.items())
    if left:
        print(f"{turn.tier}: left are {left}")
    elif turn.batch is None:
        print(f"{turn.tier}: nothing is approved")


def _as_data(turn: Trained) -> dict[str, Any]:
    return {
        "tier": turn.tier,
        "chosen": [moment.moment_id for moment in turn.choice.chosen],
        "left": {reason: [one.moment_id for one in left] for reason, left in turn.choice.left.items()},
        "batch_id": turn.batch.batch_id if turn.batch else None,
        "sync": msgspec.to_builtins(turn.sync),
    }


def _describe_moment(moment: Moment) -> str:
    surprise = "-" if moment.surprise is None else f"{moment.surprise:.2f}"
    text = " ".join(moment.answer.content.split()) if moment.answer else ""
    shown = text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "..."
    return (
        f"{moment.moment_id}  {moment.kind}  {moment.source}  surprise {surprise}  "
        f"confidence {moment.confidence:.2f}  {shown}"
    )
