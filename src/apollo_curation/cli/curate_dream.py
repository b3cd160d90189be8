"""`apollo-ipc curate dream | feed | dreams`: situations made from seeds, ours or another program's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import msgspec
import typer
from rich.table import Column, Table

from apollo_curation.settings import CurationConfig, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, describe_ago, print_json, say
from apollo_ipc.errors import UserError

if TYPE_CHECKING:
    from apollo_curation.dreams.bridge import Bridge
    from apollo_curation.dreams.night import Night
    from apollo_curation.dreams.protocol import Done, Out
    from apollo_curation.dreams.table import Dream

TEXT_SHOWN = 60  # characters of a situation
EXIT_STATUS = {"done": 0, "budget": 0, "input": 0, "away": 69, "stopped": 1}


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
    from apollo_curation.cli.curate_train import stop_by_signal
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
    with stop_by_signal() as stop, open_dreaming(config, stop) as bridge:
        night = loop.dream(good, bridge, again=again, stop=stop, each=lambda one: say(describe_dream(one)))
    if as_json:
        print_json({**msgspec.to_builtins(night), "broken": broken})
    else:
        _print_night(night, len(broken))
    raise typer.Exit(EXIT_STATUS[night.ended_by] or int(night.num_failed > 0))


def feed(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL of the protocol; - to talk over stdin and stdout.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="RESULT", help="The answers go to this file instead.")
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Take situations, verdicts and finished samples from a dream program of your own.

    The protocol stands in apollo_curation/dreams/protocol.py. Wrong lines are answered, not fatal. Exit
    status 1 where training failed or was stopped, 2 where the first line is not the protocol's, 69 where
    model, judge or worker stayed away.
    """
    from apollo_curation.dreams.feed import Feed
    from apollo_curation.logs.conversation import Conversation
    from apollo_curation.logs.strip import strip

    config = load_curation_config(config_file)
    has_dialogue = str(file) == "-" and out is None
    if has_dialogue and as_json:
        raise UserError("standard output is the protocol's here; give --out RESULT as well", field="--json")

    def without_instructions(conversation: Conversation) -> tuple[Conversation, str | None]:
        stripped = strip(conversation, config.curation.strip)
        return stripped.conversation, stripped.problem

    path = "standard input" if str(file) == "-" else str(file)
    with (
        _reading(file) as lines,
        _writing(out, has_dialogue) as answer,
        open_dreaming(config) as bridge,
    ):
        one = Feed(bridge, without_instructions, answer, path=path, has_dialogue=has_dialogue)
        done = one.run(lines)
    if as_json:
        print_json(done)
    elif not has_dialogue:
        _print_done(done)
    raise typer.Exit(EXIT_STATUS[done.ended_by] or int(done.num_failed > 0))


def dreams(
    seed: Annotated[str | None, typer.Option(metavar="ID", help="Of this seed only.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 50,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What was dreamt: each dream with what it is a variation of, its verdict, and what was trained."""
    from apollo_curation.dreams.table import Dreams
    from apollo_curation.store import Store, store_path

    with Store(store_path(load_curation_config(config_file))) as store:
        found = Dreams(store).list(seed, limit)
    if as_json:
        print_json([{**msgspec.to_builtins(one), "lineage": one.lineage} for one in found])
    else:
        console().print(dreams_table(found) if found else "no dreams yet")


@contextmanager
def open_dreaming(config: CurationConfig, stop: Callable[[], bool] = lambda: False) -> Iterator[Bridge]:
    """The bridge by the configuration, when what an earlier run left open has been settled. What it trains is
    watched where quality.heldout is set: raises QualityBroken."""
    from apollo_curation.cli.curate_train import open_learning
    from apollo_curation.dreams.bridge import open_bridge
    from apollo_curation.quality.watch import watched

    with (
        open_learning(config, stop) as learning,
        watched(config, learning.store, learning.training, stop) as each,
    ):
        learning.batches.resume(each)
        with open_bridge(config, learning.store, learning.batches, each=each, stop=stop) as bridge:
            yield bridge


def describe_dream(dream: Dream) -> str:
    parts = [f"dream {dream.dream_id} of seed {dream.seed_id} ({dream.topic})"]
    if dream.verdict is not None:
        parts.append(f"answered {'well' if dream.verdict.good else 'badly'}: {dream.verdict.reason}")
    if dream.state not in ("good", "open"):
        parts.append(f"{dream.state}{f' ({dream.reason})' if dream.reason else ''}")
    return ", ".join(parts)


def dreams_table(found: list[Dream]) -> Table:
    whole = ("dream", "varies", "seed", "round", "state", "answered", "batch", "made")
    table = Table(*(Column(name, no_wrap=True) for name in whole), "situation", box=None, pad_edge=False)
    for one in found:
        verdict = "-" if one.verdict is None else "well" if one.verdict.good else "badly"
        text = " ".join(one.situation[-1].content.split())
        table.add_row(
            one.dream_id,
            one.parent or "-",
            one.seed_id,
            str(one.round),
            one.state,
            verdict,
            one.batch_id or "-",
            describe_ago(one.created_at),
            text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "...",
        )
    return table


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


def _print_done(done: Done) -> None:
    print(
        f"{done.num_situations} situations and {done.num_samples} samples: {done.num_good} answered well, "
        f"{done.num_bad} badly, {done.num_trained} trained, {done.num_failed} failed, {done.num_dropped} "
        f"dropped, {done.num_unjudged} without a verdict, {done.num_errors} errors; ended: {done.ended}"
    )


@contextmanager
def _reading(file: Path) -> Iterator[BinaryIO]:
    if str(file) == "-":
        yield sys.stdin.buffer
        return
    try:
        lines = file.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", field="FILE") from None
    with lines:
        yield lines


@contextmanager
def _writing(out: Path | None, has_dialogue: bool) -> Iterator[Callable[[Out], None]]:
    """Takes answers: to the file, to standard output, or nowhere. A program that no longer reads them does
    not keep what it sent from being trained."""
    from apollo_curation.dreams.protocol import encode

    if out is None and not has_dialogue:
        yield lambda answer: None
        return
    try:
        file: Any = out.open("wb") if out is not None else sys.stdout.buffer
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}", field="--out") from None
    is_heard = True

    def write(answer: Out) -> None:
        nonlocal is_heard
        if is_heard:
            try:
                file.write(encode(answer))
                file.flush()
            except BrokenPipeError:
                is_heard = False

    try:
        yield write
    finally:
        if out is not None:
            file.close()
