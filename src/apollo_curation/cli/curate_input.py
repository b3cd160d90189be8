"""`apollo-ipc curate strip | flag`: what is in the logs, what goes out of them, and what is noticed."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apollo_curation.cli.common import Paths, open_moments, sources, stop_by_signal
from apollo_curation.settings import load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, print_json, print_json_line
from apollo_ipc.errors import UserError
from apollo_ipc.process.progress import progress
from apollo_ipc.process.say import say

if TYPE_CHECKING:
    from apollo_curation.logs.strip_report import StripReport
    from apollo_curation.moments.signals.intake import Taken

POLL_S = 2.0  # how often --follow looks for more
STOP_S = 0.1  # within which Ctrl-C is heard meanwhile
NUM_BROKEN_SHOWN = 3  # of each reason


def strip(
    paths: Paths = None,
    num_previews: Annotated[
        int, typer.Option("--preview", metavar="N", min=0, help="Show N conversations before and after.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write what is left as JSONL, for training.")
    ] = None,
    with_model: Annotated[
        bool, typer.Option("--model-tokens", help="Count tokens by the served model instead of estimating.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Say what the logs hold, what cannot be read, and what share of it curation.strip takes out. Keeps
    nothing."""
    from apollo_curation.chat_client import learner
    from apollo_curation.logs import readers
    from apollo_curation.logs import strip as stripping
    from apollo_curation.logs.conversation import Broken
    from apollo_curation.logs.strip_report import StrippedFile, StripTally, print_diff

    config = load_curation_config(config_file)
    files, rules = sources(paths, config), config.curation.strip
    model = learner(config) if with_model else None
    tally = StripTally(rules, model and (lambda text: len(model.text_tokens(text, add_special_tokens=False))))
    pruned: list[stripping.Removed] = []
    prune = stripping.pruner(rules)

    def keep_pruned(record: dict) -> list[stripping.Removed]:
        pruned[:] = prune(record) if prune else []
        return pruned

    broken: dict[str, list[Broken]] = {}
    lost, passed_over = Counter[str](), Counter[str]()
    topics: Counter[str] = Counter()
    num_shown = 0
    screen = console(stderr=as_json)
    limit = config.curation.max_record_bytes
    with (
        progress("reading the logs", is_quiet=num_previews > 0) as doing,
        StrippedFile(out, readers.find_files(files)) as written,
    ):
        for record in readers.read(files, max_record_bytes=limit, prune=keep_pruned, passed_over=passed_over):
            lost.update(record.lost)
            if isinstance(record, Broken):
                broken.setdefault(record.reason, []).append(record)
                continue
            topics[record.topic] += 1
            doing("reading the logs", note=f"{topics.total()} conversations")
            stripped = stripping.strip(record, rules)
            tally.add(stripped, pruned)
            if stripped.problem is None:
                written.add(stripped.conversation)
            if num_shown < num_previews and (stripped.removed or pruned):
                num_shown += 1
                print_diff(screen, record, stripped, pruned)
                screen.print()
    report = tally.report()
    if as_json:
        print_json(
            {
                "report": report,
                "num_broken": sum(map(len, broken.values())),
                "broken": {reason: len(records) for reason, records in broken.items()},
                "examples": [one for records in broken.values() for one in records[:NUM_BROKEN_SHOWN]],
                "lost": dict(lost.most_common()),
                "passed_over": dict(passed_over.most_common()),
                "topics": dict(topics.most_common()),
                "num_written": written.num_written,
            }
        )
        return
    _print_report(report, len(topics))
    for reason, records in broken.items():
        print(f"{len(records):>7}  broken and passed over, {reason}:")
        for record in records[:NUM_BROKEN_SHOWN]:
            print(f"         {record.source}: {record.message}")
    print_passed_over(lost, passed_over)
    if out is not None:
        print(f"{written.num_written} conversations written to {out}")


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
    from apollo_curation.moments.signals import intake

    config = load_curation_config(config_file)
    files = sources(paths, config)
    if follow and from_beginning:
        raise UserError("--follow goes on from where it was read; leave --all away", field="--all")
    if paths or not follow:
        readers.find_files(files)  # names what is not there; a followed source may come later
    taken = intake.Taken()
    with open_moments(config) as (store, moments), stop_by_signal() as stop:
        follower = Follower(store, files, config.curation, from_beginning=from_beginning)
        while True:
            num_before = taken.num_conversations, taken.added.total()
            with progress("reading the logs"):
                intake.take_new(store, moments, follower, config.curation, taken, stop=stop)
            num_now = taken.num_conversations, taken.added.total()
            if not follow or stop():
                break
            if as_json and num_now != num_before:
                print_json_line(dict(zip(("num_conversations", "num_added"), num_now, strict=True)))
            elif num_now[1] != num_before[1]:
                say(describe_taken(taken))
            looks_again = time.monotonic() + POLL_S
            while time.monotonic() < looks_again and not stop():
                time.sleep(STOP_S)
    if as_json:
        (print_json_line if follow else print_json)(taken.as_data())
        return
    print(describe_taken(taken))
    for record in taken.first_broken.values():
        say(f"{taken.broken[record.reason]} broken, {record.reason}: {record.source}: {record.message}")
    print_passed_over(taken.lost, taken.passed_over)


def describe_taken(taken: Taken) -> str:
    kinds = ", ".join(f"{num} {kind}" for kind, num in taken.added.most_common())
    parts = [f"{taken.num_conversations} conversations", f"{taken.added.total()} new moments"]
    parts[-1] += f" ({kinds})" if kinds else ""
    for num, words in (
        (taken.num_known, "known already"),
        (taken.num_improved, "of them with more to learn now"),
        (taken.problems.total(), "of no use after stripping"),
        (taken.broken.total(), "broken records"),
    ):
        if num:
            parts.append(f"{num} {words}")
    return ", ".join(parts)


def print_passed_over(lost: Counter[str], files: Counter[str]) -> None:
    """What readers left out, and files that nobody opened, by name."""
    if lost:
        print(f"left out: {', '.join(f'{num} {name}' for name, num in lost.most_common())}")
    if files:
        kinds = ", ".join(f"{ending} {num}" for ending, num in files.most_common())
        print(f"{files.total()} files passed over: {kinds}")


def _print_report(report: StripReport, num_topics: int) -> None:
    about = "about " if report.is_estimate else ""
    print(
        f"{report.num_conversations} conversations, {report.num_changed} changed, "
        f"{report.num_refused} refused, {num_topics} topics; {about}{report.num_removed_tokens:,} of "
        f"{report.num_tokens:,} tokens ({report.share:.1%}) stripped"
    )
    for rule in report.rules:
        print(f"{rule.share:>7.1%}  {rule.num_tokens:>9,} tokens in {rule.num_parts} parts  {rule.rule}")
    for text, num in [*report.problems.items(), *report.notes.items()]:
        print(f"{num:>7}  {text}")
    if report.is_estimate:
        print("tokens are estimated by words; --model-tokens asks the served model")
