"""`apollo-ipc curate train | run | dream | night`: approved moments and dreams become training jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from apollo_curation.cli.common import open_learning, open_moments, short, stop_by_signal
from apollo_curation.cli.curate_status import describe_batch, describe_dream
from apollo_curation.settings import CurationConfig, TierName, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import print_json, print_json_line
from apollo_ipc.errors import UserError
from apollo_ipc.process.progress import Doing, progress, say_nothing
from apollo_ipc.process.say import say

if TYPE_CHECKING:
    from apollo_curation.dreams.bridge import Bridge
    from apollo_curation.dreams.night import Night
    from apollo_curation.dreams.table import Dream
    from apollo_curation.moments.moments import Moment
    from apollo_curation.training.batch_table import TrainingBatch
    from apollo_curation.training.batches import Each
    from apollo_curation.training.schedule import Trained
    from apollo_ipc.wire.replies import JobInfo

TEXT_SHOWN = 80  # characters of an answer
EXIT_STATUS = {"done": 0, "budget": 0, "away": 69, "stopped": 1}  # of dreams, by what ended them

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
    batches: list[TrainingBatch] = []
    turns: list[Trained] = []
    broken: QualityBroken | None = None
    with open_learning(config) as learning:
        if is_dry_run:
            with progress("choosing"):
                turns = [Trained(one, learning.choose(one, limit)) for one in tiers]
            _print_choices(turns, as_json)
            return
        learning.batches.forget()
        try:
            with (
                progress("measuring, choosing") as doing,
                watched(config, learning.store, learning.training) as watching,
            ):
                each = _shown(doing, watching)
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
    or SIGTERM. A job that runs then goes on, and is settled at the next start. With --json a line a batch.

    Watched where quality.heldout is set: exit status 1 where the model became worse than it may."""
    from apollo_curation.chat_client import judging
    from apollo_curation.quality.watch import Watching
    from apollo_curation.training import schedule
    from apollo_curation.training.idle import Idleness

    config = load_curation_config(config_file)
    with (
        stop_by_signal() as stop,
        open_learning(config, stop) as learning,
        closing(judging(config, stop)) as other,
    ):
        judge = other if config.judge.enabled else None
        watching = Watching(config, learning.store, learning.model, judge, learning.training)
        schedule.run(
            learning,
            # What is asked to be held, and by the monitor, is of the same client, and so nobody else's.
            Idleness(learning.model, config.curation.idle_s),
            stop=stop,
            watch=watching.turn,
            on_batch=lambda batch: print_json_line(batch) if as_json else say(describe_batch(batch)),
            on_away=lambda error: say(f"{error}; waiting for it"),
        )


def dream(
    seeds: Annotated[
        list[Path] | None,
        typer.Option("--seeds", help="File or directory, again for more [default: dream.seeds]."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many seeds [default: dream.max_seeds].")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also seeds that held, or were given up, before.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Dream of each seed until the model answers new situations well; train on better answers in between.

    Exit status 1 where training failed or was stopped, 69 where model, judge or worker stayed away. Ctrl-C
    ends it after the dream that is under way; the next start goes on.
    """
    from apollo_curation.dreams import dream as loop
    from apollo_curation.dreams.seeds import Seed, read_seeds
    from apollo_curation.logs.conversation import Broken

    config = load_curation_config(config_file)
    paths = seeds or [Path(path) for path in config.dream.seeds]
    if not paths:
        raise UserError("there are no seeds; name files with --seeds, or in dream.seeds", field="--seeds")
    if limit is not None:
        config = msgspec.structs.replace(config, dream=msgspec.structs.replace(config.dream, max_seeds=limit))
    found = list(read_seeds(paths, max_record_bytes=config.curation.max_record_bytes))
    broken = [one for one in found if isinstance(one, Broken)]
    for one in broken:
        say(f"{one.source}: {one.message}")
    good = [one for one in found if isinstance(one, Seed)]
    with (
        stop_by_signal() as stop,
        progress(f"dreaming of {len(good)} seeds") as doing,
        open_dreaming(config, stop, doing) as bridge,
    ):

        def each(one: Dream) -> None:
            say(describe_dream(one))
            doing(f"dreaming of {len(good)} seeds")

        night = loop.dream(good, bridge, again=again, stop=stop, each=each)
    if as_json:
        print_json({**msgspec.to_builtins(night), "broken": broken})
    else:
        _print_night(night, len(broken))
    raise typer.Exit(EXIT_STATUS[night.ended_by] or int(night.num_failed > 0))


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

    config = load_curation_config(config_file)
    with (
        stop_by_signal() as stop,
        open_moments(config) as (store, _),
        progress("the night begins") as doing,
    ):
        report = run_night(config, store, is_auto=is_auto, stop=stop, say=say, doing=doing)
    if as_json:
        print_json(report)
    else:
        print(f"{report.ended}; report: {report.html}")
    raise typer.Exit(report.exit_code)


@contextmanager
def open_dreaming(
    config: CurationConfig, stop: Callable[[], bool] = lambda: False, doing: Doing = say_nothing
) -> Iterator[Bridge]:
    """The bridge by the configuration, when what an earlier run left open has been settled. What it trains is
    watched where quality.heldout is set: raises QualityBroken."""
    from apollo_curation.dreams.bridge import open_bridge
    from apollo_curation.quality.watch import watched

    with (
        open_learning(config, stop) as learning,
        watched(config, learning.store, learning.training, stop) as watching,
    ):
        each = _shown(doing, watching)
        learning.batches.resume(each)
        with open_bridge(config, learning.store, learning.batches, each=each, stop=stop) as bridge:
            yield bridge


def _shown(doing: Doing, each: Each) -> Each:
    """`each`, and the job's steps on the terminal."""

    def seen(job: JobInfo) -> None:
        note = "" if job.loss_last is None else f"loss {job.loss_last:.4g}"
        doing(f"{job.job_id}: {job.state}", job.steps_done, job.num_steps, note=note)
        each(job)

    return seen


def _print_night(night: Night, num_broken: int) -> None:
    for seed in night.seeds:
        reason = f": {seed.reason}" if seed.reason else ""
        print(
            f"seed {seed.seed_id} ({seed.topic}): {seed.state.replace('_', ' ')}{reason}, "
            f"{seed.num_dreams} dreams, {seed.num_rounds} rounds of training"
        )
    print(
        f"{night.num_dreams} dreams: {night.num_good} answered well, {night.num_bad} badly, "
        f"{night.num_trained} trained, {night.num_failed} failed, {night.num_dropped} dropped, "
        f"{night.num_repeats} repetitions"
    )
    skipped = f"{night.num_skipped_seeds} seeds held or given up before, {num_broken} broken"
    print(f"{len(night.seeds)} seeds, {skipped}; ended: {night.ended}")


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
    shown = short(moment.answer.content, TEXT_SHOWN) if moment.answer else ""
    if moment.moves_away and moment.original:
        shown = f"away from: {short(moment.original.content, TEXT_SHOWN)}"
    return (
        f"{moment.moment_id}  {moment.kind}  {moment.source}  surprise {surprise}  "
        f"confidence {moment.confidence:.2f}  {shown}\n      {moment.why}"
    )
