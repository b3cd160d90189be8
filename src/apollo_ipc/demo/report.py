"""What the demonstration found: one table, one JSON object, and whether every claim held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apollo_ipc.demo.stream import CompletionStream
from apollo_ipc.words import is_in

SHOWN = 90  # characters of an answer in the table; --json has all of it


class Answer(msgspec.Struct):
    """To a question that was never taught. It is right where it holds `key` (is_in); to a near miss, where it
    should not."""

    question: str
    key: str
    before: str = ""
    after: str = ""  # by the same running server
    after_reload: str = ""  # by transformers, from the synced directory

    @property
    def is_right(self) -> bool:
        return is_in(self.key, self.after)

    @property
    def was_right(self) -> bool:
        return is_in(self.key, self.before)

    @property
    def is_same(self) -> bool:
        """Word for word."""
        return self.after == self.before


class TaughtAnswer(Answer):
    """To a question that was taught."""

    taught: str = ""


class Report(msgspec.Struct):
    """Latencies are of short completions: `before` in the pauses beside the training, `during` inside it,
    `asking` while the teacher asks the same server its own questions. known, hits, rise: of the examination
    of `POST /teach` (docs/learning.md)."""

    arch: str
    model: str = ""
    parameters: int = 0
    parameters_mapped: int = 0
    steps: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    requests_served: int = 0
    requests_served_during_training: int = 0
    requests_failed: int = 0
    latency_p50_before_s: float | None = None
    latency_p99_before_s: float | None = None
    latency_p50_during_s: float | None = None
    latency_p99_during_s: float | None = None
    latency_p50_asking_s: float | None = None
    latency_p99_asking_s: float | None = None
    known: float | None = None
    hits: float | None = None
    rise: float | None = None
    bytes_synced: int = 0
    weight_version: int = 0
    duration_s: float = 0.0
    answers: list[TaughtAnswer] = []
    answers_paraphrased: list[Answer] = []  # taught in other words
    answers_backwards: list[Answer] = []
    answers_near: list[Answer] = []  # about something else, in the form of what was taught
    answers_general: list[Answer] = []
    problems: list[str] = []

    @property
    def latency_p99_ratio(self) -> float | None:
        if not self.latency_p99_before_s or self.latency_p99_during_s is None:
            return None
        return self.latency_p99_during_s / self.latency_p99_before_s

    def find_problems(self) -> list[str]:
        """Every claim that did not hold. Latency is shown, not judged: shared machines are too noisy."""
        found = []
        if not 0 < self.parameters_mapped == self.parameters:
            found.append(f"only {self.parameters_mapped} of {self.parameters} parameters are mapped")
        if self.requests_failed:
            found.append(f"{self.requests_failed} completions failed")
        if not self.requests_served_during_training:
            found.append("no completion was served while training ran")
        if self.loss_first is None or self.loss_last is None or not self.loss_last < self.loss_first:
            found.append(f"the loss did not fall: {self.loss_first} to {self.loss_last}")
        if not self.bytes_synced:
            found.append("the sync wrote nothing")
        for answer in self.answers:
            if answer.was_right:
                found.append(f"{answer.question!r} was answered before it was taught")
            if not answer.is_right:
                found.append(f"{answer.question!r}: served answer {answer.after!r}, taught {answer.taught!r}")
            if not is_in(answer.key, answer.after_reload):
                found.append(f"{answer.question!r}: reloaded from disk it answers {answer.after_reload!r}")
        return found

    def all_answers(self) -> list[Answer]:
        untaught = [*self.answers_paraphrased, *self.answers_backwards, *self.answers_near]
        return [*self.answers, *untaught, *self.answers_general]

    def take_latencies(self, stream: CompletionStream) -> None:
        self.requests_served = stream.num_served
        self.requests_served_during_training = stream.num_served_by_label["during"]
        self.requests_failed = len(stream.failures)
        self.latency_p50_before_s = stream.percentile_s("before", 50)
        self.latency_p99_before_s = stream.percentile_s("before", 99)
        self.latency_p50_during_s = stream.percentile_s("during", 50)
        self.latency_p99_during_s = stream.percentile_s("during", 99)
        self.latency_p50_asking_s = stream.percentile_s("asking", 50)
        self.latency_p99_asking_s = stream.percentile_s("asking", 99)

    def write_json(self, path: Path) -> None:
        judged = {
            "answers": [_with(answer, "is_right") for answer in self.answers],
            "answers_paraphrased": [_with(answer, "is_right") for answer in self.answers_paraphrased],
            "answers_backwards": [_with(answer, "is_right") for answer in self.answers_backwards],
            "answers_near": [{**_with(answer), "is_hit": answer.is_right} for answer in self.answers_near],
            "answers_general": [_with(answer, "is_same", "is_right") for answer in self.answers_general],
        }
        beside = {"latency_p99_ratio": self.latency_p99_ratio, "ok": not self.problems}
        data = {**msgspec.to_builtins(self), **judged, **beside}
        path.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")

    def print(self, console: Console) -> None:
        title = f"{self.model}: the same server, before and after"
        table = Table(title=title, title_justify="left", show_lines=True)
        for column in ("", "question", "before", "after", "from disk, by transformers"):
            table.add_column(column)
        for answer in self.answers:
            _add(table, "taught", answer, _yes_or_no(answer.is_right))
        for answer in self.answers_paraphrased:
            _add(table, "not taught,\nparaphrased", answer, _yes_or_no(answer.is_right))
        for answer in self.answers_backwards:
            _add(table, "not taught,\nbackwards", answer, _yes_or_no(answer.is_right))
        for answer in self.answers_near:
            _add(table, "near miss", answer, "[red]names the fact[/red]" if answer.is_right else "left alone")
        for answer in self.answers_general:
            kept = (
                "same words" if answer.is_same else "still right" if answer.is_right else "[red]changed[/red]"
            )
            _add(table, "general", answer, kept if answer.was_right else "was wrong before")
        console.print(table)
        if self.answers_paraphrased:
            self._print_counts(console)
        figures = Table(show_header=False)
        figures.add_row("parameters mapped", f"{self.parameters_mapped} of {self.parameters}")
        figures.add_row("training steps", str(self.steps))
        figures.add_row("loss, first and last", f"{_number(self.loss_first)}  {_number(self.loss_last)}")
        figures.add_row("completions served during training", str(self.requests_served_during_training))
        figures.add_row("completions failed", str(self.requests_failed))
        before = f"{_ms(self.latency_p50_before_s)} / {_ms(self.latency_p99_before_s)}"
        during = f"{_ms(self.latency_p50_during_s)} / {_ms(self.latency_p99_during_s)}"
        figures.add_row("completion p50 / p99 without training", before)
        ratio = _ratio(self.latency_p99_ratio)
        figures.add_row("completion p50 / p99 during training", f"{during}  (p99 {ratio})")
        if self.latency_p99_asking_s is not None:
            asking = f"{_ms(self.latency_p50_asking_s)} / {_ms(self.latency_p99_asking_s)}"
            figures.add_row("completion p50 / p99 while the teacher asks", asking)
        if self.rise is not None:
            examined = f"{self.known:.0%} known, {self.hits:.0%} of near misses hit, {self.rise:+.2f} nats"
            figures.add_row("the teacher's own examination", examined)
        figures.add_row("bytes synced", f"{self.bytes_synced:,}")
        figures.add_row("seconds in all", f"{self.duration_s:.0f}")
        console.print(figures)
        for problem in self.problems:
            console.print(f"[red]NOT SO:[/red] {problem}")
        if not self.problems:
            # Nothing is claimed of the other answers: they are shown as they are.
            console.print(
                "[green]Held: the taught facts, served and from disk; completions; the sync.[/green]"
            )

    def _print_counts(self, console: Console) -> None:
        known = [answer for answer in self.answers_general if answer.was_right]
        counts = [
            f"{_num_right(self.answers)} of {len(self.answers)} taught",
            f"{_num_right(self.answers_paraphrased)} of {len(self.answers_paraphrased)} paraphrased",
            f"{_num_right(self.answers_backwards)} of {len(self.answers_backwards)} backwards",
            f"{_num_right(known)} of the {len(known)} general ones that were right before",
        ]
        hits, near = _num_right(self.answers_near), len(self.answers_near)
        console.print(f"Right after: {', '.join(counts)}. Near misses that name a fact: {hits} of {near}.")


def _num_right(answers: Sequence[Answer]) -> int:
    return sum(one.is_right for one in answers)


def _with(answer: msgspec.Struct, *names: str) -> dict:
    return {**msgspec.to_builtins(answer), **{name: getattr(answer, name) for name in names}}


def _add(table: Table, kind: str, answer: Answer, verdict: str) -> None:
    table.add_row(
        f"{kind}\n{verdict}",
        *map(_short, (answer.question, answer.before, answer.after, answer.after_reload)),
    )


def _yes_or_no(is_right: bool) -> str:
    return "[green]right[/green]" if is_right else "[yellow]not right[/yellow]"


def _short(text: str) -> str:
    """On one line; what an answer may hold is no markup."""
    line = " ".join(text.split())
    return escape(line if len(line) <= SHOWN else line[: SHOWN - 3] + "...")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.0f} ms"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
