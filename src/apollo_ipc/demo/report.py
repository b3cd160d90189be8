"""What the demonstration found: one table, one JSON object, and whether every claim held."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table


class Answer(msgspec.Struct):
    question: str
    taught: str
    before: str = ""
    after: str = ""  # by the same running server
    after_reload: str = ""  # by transformers, from the synced directory


class Report(msgspec.Struct):
    """Latencies are of short completions: `before` in the pauses between rounds, `during` inside them."""

    arch: str
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
    bytes_synced: int = 0
    weight_version: int = 0
    duration_s: float = 0.0
    answers: list[Answer] = []
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
            if answer.before == answer.taught:
                found.append(f"{answer.question!r} was answered before it was taught")
            if answer.after != answer.taught:
                found.append(f"{answer.question!r}: served answer {answer.after!r}, taught {answer.taught!r}")
            if answer.after_reload != answer.taught:
                found.append(f"{answer.question!r}: reloaded from disk it answers {answer.after_reload!r}")
        return found

    def write_json(self, path: Path) -> None:
        beside = {"latency_p99_ratio": self.latency_p99_ratio, "ok": not self.problems}
        data = {**msgspec.to_builtins(self), **beside}
        path.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")

    def print(self, console: Console) -> None:
        table = Table(title="The same server, before and after", title_justify="left")
        for column in ("question", "before", "after", "from disk, by transformers"):
            table.add_column(column)
        for answer in self.answers:
            table.add_row(answer.question, repr(answer.before), answer.after, answer.after_reload)
        console.print(table)
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
        figures.add_row("bytes synced", f"{self.bytes_synced:,}")
        figures.add_row("seconds in all", f"{self.duration_s:.0f}")
        console.print(figures)
        for problem in self.problems:
            console.print(f"[red]NOT SO:[/red] {problem}")
        if not self.problems:
            console.print("[green]Everything above held.[/green]")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.0f} ms"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
