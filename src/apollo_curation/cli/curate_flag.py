"""`apollo-ipc curate flag`: from the logs to flagged moments."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from apollo_curation.cli.curate_input import Paths, sources
from apollo_curation.cli.curate_train import stop_by_signal
from apollo_curation.settings import CurationConfig, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import print_json, print_json_line, say
from apollo_ipc.errors import UserError

if TYPE_CHECKING:
    from apollo_curation.logs.follow import Follower
    from apollo_curation.moments.moments import Moments
    from apollo_curation.moments.signals.intake import Taken
    from apollo_curation.settings import Curation
    from apollo_curation.store import Store

POLL_S = 2.0  # how often --follow looks for more
STOP_S = 0.1  # within which Ctrl-C is heard meanwhile


def flag(
    paths: Paths = None,
    from_beginning: Annotated[
        bool, typer.Option("--all", help="Read all of it again, not only what is new.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as the logs grow, until Ctrl-C.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Read what is new in the logs, and keep the moments that the rules notice, each once."""
    from apollo_curation.logs import readers
    from apollo_curation.logs.follow import Follower
    from apollo_curation.logs.strip import pruner
    from apollo_curation.moments.signals import intake

    config = load_curation_config(config_file)
    own = config.curation
    files = sources(paths, config)
    if follow and from_beginning:
        raise UserError("--follow goes on from where it was read; leave --all away", field="--all")
    if paths or not follow:
        readers.find_files(files)  # names what is not there; a followed source may come later
    taken, prune = intake.Taken(), pruner(own.strip)
    with open_moments(config) as (store, moments):
        if from_beginning:
            records = readers.read(files, max_record_bytes=own.max_record_bytes, prune=prune)
            intake.take_all(store, moments, records, own, taken)
        else:
            follower = Follower(store, files, max_record_bytes=own.max_record_bytes, prune=prune)
            if follow:
                _follow(store, moments, follower, own, taken, as_json)
            else:
                intake.take_new(store, moments, follower, own, taken)
    if as_json:
        (print_json_line if follow else print_json)(taken.as_data())
    else:
        print(describe_taken(taken))
        for record in taken.first_broken.values():
            say(f"{taken.broken[record.reason]} broken, {record.reason}: {record.source}: {record.message}")


@contextmanager
def open_moments(config: CurationConfig) -> Iterator[tuple[Store, Moments]]:
    from apollo_curation.moments.moments import Moments
    from apollo_curation.store import Store, store_path

    with Store(store_path(config)) as store:
        yield store, Moments(store)


def describe_taken(taken: Taken) -> str:
    kinds = ", ".join(f"{num} {kind}" for kind, num in taken.added.most_common())
    parts = [f"{taken.num_conversations} conversations", f"{taken.added.total()} new moments"]
    parts[-1] += f" ({kinds})" if kinds else ""
    if taken.num_known:
        parts.append(f"{taken.num_known} known already")
    if taken.num_improved:
        parts.append(f"{taken.num_improved} of them with more to learn now")
    if taken.problems:
        parts.append(f"{taken.problems.total()} of no use after stripping")
    if taken.broken:
        parts.append(f"{taken.broken.total()} broken records")
    return ", ".join(parts)


def _follow(
    store: Store, moments: Moments, follower: Follower, settings: Curation, taken: Taken, as_json: bool
) -> None:
    from apollo_curation.moments.signals import intake

    with stop_by_signal() as stop:
        while not stop():
            num_before = taken.num_conversations, taken.added.total()
            intake.take_new(store, moments, follower, settings, taken, stop)
            num_now = taken.num_conversations, taken.added.total()
            if as_json and num_now != num_before:
                new = dict(zip(("num_conversations", "num_added"), num_now, strict=True))
                print_json_line(new)
            elif num_now[1] != num_before[1]:
                say(describe_taken(taken))
            looks_again = time.monotonic() + POLL_S
            while time.monotonic() < looks_again and not stop():
                time.sleep(STOP_S)
