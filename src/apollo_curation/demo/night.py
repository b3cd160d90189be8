"""`make demo-night`: one unattended night of a small served model, from the day's logs to the report.

make model and day -> apollo-ipc serve -> measure -> apollo-ipc curate night -> measure again -> verify
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from apollo_curation.chat_client import ChatClient
from apollo_curation.demo import night_corpus as corpus
from apollo_curation.demo.scripted_model import ScriptedModel
from apollo_ipc import checkpoint
from apollo_ipc.demo.served import ServedModel, quieten_libraries, say
from apollo_ipc.errors import ApolloError
from apollo_ipc.process.serving import ServerFailed
from apollo_ipc.wire.requests import Message

NIGHT_TIMEOUT_S = 1200.0
NUM_VARIATIONS = 8  # questions that were in no log
# Every stage of a night and what it must at least have done.
MUST_DO = {
    "watch": 1,
    "read": 30,
    "judge": 4,
    "score": 20,
    "dream": 4,
    "train": 20,
    "watch again": 1,
    "checkpoint": 1,
    "report": 1,
}


class Shift(msgspec.Struct):
    """Mean loss in nats a token, of answers to questions that were in no log."""

    what: str
    before: float = 0.0
    after: float = 0.0


class DemoNight(msgspec.Struct):
    night: dict[str, Any] = {}
    exit_code: int | None = None
    shifts: list[Shift] = []
    weight_version: int = 0
    html: str | None = None
    html_bytes: int = 0
    duration_s: float = 0.0
    problems: list[str] = []

    def find_problems(self) -> list[str]:
        found = [f"the night ended with {self.exit_code}"] if self.exit_code else []
        stages = {stage["name"]: stage for stage in self.night.get("stages", [])}
        for name, least in MUST_DO.items():
            num_done = stages.get(name, {}).get("num_done", 0)
            if num_done < least:
                found.append(f"the stage {name!r} did {num_done}, at least {least} was expected")
        for name in ("flagged", "followed", "broken"):
            if not stages.get("read", {}).get("facts", {}).get(name):
                found.append(f"nothing was {name}")
        if not stages.get("dream", {}).get("facts", {}).get("held"):
            found.append("no dreamt pattern held")
        found += [
            f"{shift.what}: {shift.before:.3f} -> {shift.after:.3f} nats a token, not less"
            for shift in self.shifts
            if not shift.after < shift.before
        ]
        if not self.html_bytes:
            found.append("no report was written")
        return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo-night", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is shown to FILE as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep model, logs and the report there")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of the day")
    options = parser.parse_args(arguments)
    quieten_libraries()
    with tempfile.TemporaryDirectory(prefix="apollo-night-") as scratch:
        directory = (options.keep or Path(scratch)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        report, started = DemoNight(), time.monotonic()
        try:
            run(directory, report, options.seed)
        except (ServerFailed, ApolloError, httpx.HTTPError) as error:
            report.problems.append(f"{type(error).__name__}: {error}")
        report.duration_s = time.monotonic() - started
        report.problems += report.find_problems()
    print_report(report, Console())
    if options.json:
        data = {**msgspec.to_builtins(report), "ok": not report.problems}
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
    return 1 if report.problems else 0


def run(directory: Path, report: DemoNight, seed: int) -> None:
    from apollo_curation.demo.night_model import make_able_model

    say("Making a small model, and teaching it a few abilities (English, greetings, doing as it is told)")
    model_dir = make_able_model(directory / "model", seed=seed)
    corpus.write_day(directory / "day", seed)
    with ServedModel(model_dir, directory) as served:
        one_night(served, directory, report, seed)
    check_disk(model_dir, report)


def one_night(served: ServedModel, directory: Path, report: DemoNight, seed: int) -> None:
    """On a server that has not seen `directory`/day yet."""
    with ScriptedModel(corpus.JudgeAndDreamer()) as scripted:
        say("Served at %s; a judge and dreamer with scripted answers at %s", served.url, scripted.url)
        model = ChatClient(served.url)
        measured = _measured(seed)
        report.shifts = [Shift(what, before=_loss(model, some)) for what, some in measured.items()]
        config = write_config(directory, served.url, scripted.url)
        night(config, served, report)
        for shift in report.shifts:
            shift.after = _loss(model, measured[shift.what])
        report.weight_version = served.get("/train/status")["weight_version"]
        model.close()
    if report.html:
        report.html_bytes = Path(report.html).stat().st_size


def check_disk(model_dir: Path, report: DemoNight) -> None:
    commit = checkpoint.read_commit(model_dir)
    if commit is None or commit.weight_version < report.weight_version:
        on_disk = None if commit is None else commit.weight_version
        report.problems.append(f"version {on_disk} is on disk, {report.weight_version} was served")
    if problems := checkpoint.verify(model_dir):
        report.problems.append(f"{len(problems)} digests of the checkpoint are wrong")


def night(config: Path, served: ServedModel, report: DemoNight) -> None:
    """The command that the systemd timer runs, as it is."""
    say("The night: apollo-ipc curate night --auto --config %s", config)
    command = [sys.executable, "-m", "apollo_ipc", "curate", "night", "--auto"]
    command += ["--config", str(config), "--json"]
    done = subprocess.run(command, env=served.env, stdout=subprocess.PIPE, text=True, timeout=NIGHT_TIMEOUT_S)
    report.exit_code = done.returncode
    try:
        report.night = json.loads(done.stdout)
    except json.JSONDecodeError:
        report.problems.append(f"the night printed no report: {done.stdout[-500:]!r}")
    report.html = report.night.get("html")


def write_config(directory: Path, url: str, judge_url: str) -> Path:
    """What differs from configs/default.toml. The rates are for a tiny model that shall learn in minutes."""
    day = directory / "day"
    file = directory / "night.toml"
    file.write_text(f"""\
[curation]
url = "{url}"
sources = ["{day / "logs"}"]
bootstrap = ["{day / "followed"}"]
max_topic_share = 1.0
max_source_share = 1.0
max_examples_per_window = 5000
patience_s = 60

[judge]
url = "{judge_url}"

[dream]
seeds = ["{day / "lessons.md"}"]
num_variations = 2
max_rounds = 10
max_tokens = 48
temperature = 0.0

[quality]
heldout = "{day / "heldout.jsonl"}"
canaries = "{day / "canaries.toml"}"
max_loss_increase = 0.1
max_canaries_lost = 3
on_breach = "restore"
max_tokens = 32

[tier_direct]
lr = 5e-5
epochs = 6

[tier_dream]
lr = 3e-5
epochs = 8
schedule = "constant"

[tier_bootstrap]
lr = 1e-4
schedule = "constant"
""")
    return file


def _measured(seed: int) -> dict[str, list[tuple[list[Message], Message]]]:
    """By name: contexts without instructions, and the answers whose likelihood is measured."""
    rng = random.Random(seed + 10_000)
    asked = [corpus.question(rng) for _ in range(NUM_VARIATIONS)]
    lessons = [(text, one[2]) for one in corpus.LESSONS for text in one[3][: corpus.NUM_TOLD]]
    pairs = {
        "answers as instructed, without the instruction": [(text, corpus.AYE) for text in asked],
        "corrected answers": list(corpus.FACTS),
        "answers by the lessons": lessons,
    }
    return {
        name: [([Message("user", text)], Message("assistant", answer)) for text, answer in some]
        for name, some in pairs.items()
    }


def _loss(model: ChatClient, examples: list[tuple[list[Message], Message]]) -> float:
    return -fmean(fmean(model.answer_logprobs(context, answer)) for context, answer in examples)


def print_report(report: DemoNight, console: Console) -> None:
    stages = Table(title="One night, unattended", title_justify="left")
    for column in ("stage", "what it did", "seconds"):
        stages.add_column(column)
    for stage in report.night.get("stages", []):
        facts = ", ".join(f"{name} {value}" for name, value in stage["facts"].items())
        did = "; ".join(filter(None, (facts, stage["problem"])))
        stages.add_row(stage["name"], did, f"{stage['duration_s']:.1f}")
    console.print(stages)
    shifts = Table(title="Loss of answers, nats a token, by the served model", title_justify="left")
    for column in ("what", "before", "after"):
        shifts.add_column(column)
    for shift in report.shifts:
        shifts.add_row(shift.what, f"{shift.before:.3f}", f"{shift.after:.3f}")
    console.print(shifts)
    told = "The judge and dreamer was a script: a model of this size cannot judge. All else was real."
    console.print(told, style="dim")
    console.print(f"report: {report.html} ({report.html_bytes:,} bytes); {report.duration_s:.0f} s in all")
    for problem in report.problems:
        console.print(f"[red]NOT SO:[/red] {problem}")
    if not report.problems:
        console.print("[green]Every stage did its part, and everything above held.[/green]")


if __name__ == "__main__":
    sys.exit(main())
