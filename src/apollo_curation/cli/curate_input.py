"""`apollo-ipc curate read | strip`: what is in the logs, and what stripping takes out of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from apollo_curation.settings import CurationConfig, load_curation_config
from apollo_ipc.cli.options import AsJson, ConfigFile
from apollo_ipc.cli.output import console, print_json, say
from apollo_ipc.errors import UserError

Paths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="PATH", help="Files and directories. Default: curation.sources."),
]


def read(
    paths: Paths = None,
    num_examples: Annotated[
        int, typer.Option("--examples", min=0, help="Broken records shown of each reason.")
    ] = 3,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Read logs as the curation does, and say what is there and what is broken. Changes nothing."""
    from apollo_curation.logs import readers
    from apollo_curation.logs.conversation import Broken
    from apollo_curation.logs.strip import pruner

    config = load_curation_config(config_file)
    files = sources(paths, config)
    num_conversations = num_messages = 0
    topics: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    examples: list[Broken] = []
    limit, prune = config.curation.max_record_bytes, pruner(config.curation.strip)
    for record in readers.read(files, max_record_bytes=limit, prune=prune):
        if isinstance(record, Broken):
            reasons[record.reason] += 1
            if reasons[record.reason] <= num_examples:
                examples.append(record)
            continue
        num_conversations += 1
        num_messages += len(record.messages)
        topics[record.topic] += 1
    if as_json:
        print_json(
            {
                "num_conversations": num_conversations,
                "num_messages": num_messages,
                "num_broken": reasons.total(),
                "broken": dict(reasons.most_common()),
                "examples": examples,
                "topics": dict(topics.most_common()),
            }
        )
        return
    print(f"{num_conversations} conversations, {num_messages} messages, {len(topics)} topics")
    if reasons:
        print(f"{reasons.total()} broken records, which are passed over:")
    for reason, num in reasons.most_common():
        print(f"{num:>7}  {reason}")
        for record in examples:
            if record.reason == reason:
                print(f"         {record.source}: {record.message}")


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
    """Strip by the rules of curation.strip, and report what share of the tokens went."""
    from apollo_curation.chat_client import learner
    from apollo_curation.logs import readers
    from apollo_curation.logs import strip as stripping
    from apollo_curation.logs.conversation import Broken
    from apollo_curation.logs.preview import print_diff
    from apollo_curation.logs.strip_report import Tally
    from apollo_curation.logs.stripped_file import StrippedFile

    config = load_curation_config(config_file)
    files, rules = sources(paths, config), config.curation.strip
    model = learner(config) if with_model else None
    tally = Tally(rules, model and (lambda text: len(model.text_tokens(text, add_special_tokens=False))))
    pruned: list[stripping.Removed] = []
    prune = stripping.pruner(rules)

    def keep_pruned(record: dict) -> list[stripping.Removed]:
        pruned[:] = prune(record) if prune else []
        return pruned

    num_broken = num_shown = 0
    screen = console(stderr=as_json)
    limit = config.curation.max_record_bytes
    with StrippedFile(out, readers.find_files(files)) as written:
        for record in readers.read(files, max_record_bytes=limit, prune=keep_pruned):
            if isinstance(record, Broken):
                num_broken += 1
                continue
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
        print_json({"report": report, "num_broken": num_broken, "num_written": written.num_written})
        return
    about = "about " if report.is_estimate else ""
    print(
        f"{report.num_conversations} conversations, {report.num_changed} changed, "
        f"{report.num_refused} refused; {about}{report.num_removed_tokens:,} of {report.num_tokens:,} tokens "
        f"({report.share:.1%}) stripped"
    )
    for rule in report.rules:
        print(f"{rule.share:>7.1%}  {rule.num_tokens:>9,} tokens in {rule.num_parts} parts  {rule.rule}")
    for text, num in [*report.problems.items(), *report.notes.items()]:
        print(f"{num:>7}  {text}")
    if report.is_estimate:
        print("tokens are estimated by words; --model-tokens asks the served model")
    if num_broken:
        say(f"{num_broken} broken records were passed over; `apollo-ipc curate read` names them")
    if out is not None:
        print(f"{written.num_written} conversations written to {out}")


def sources(paths: list[Path] | None, config: CurationConfig) -> list[Path]:
    """What the command line names, else what the configuration does. Raises UserError where neither does."""
    found = paths or [Path(source).expanduser() for source in config.curation.sources]
    if not found:
        raise UserError(
            "nothing to read: name files or directories, or set `sources` in [curation] of the configuration",
            field="PATH",
        )
    return found
