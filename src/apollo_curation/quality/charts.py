"""Line charts as SVG: no script, colours from the page's CSS variables, each point with its value as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
from markupsafe import Markup, escape

NUM_COLOURS = 8  # --s1 to --s8 of the page's style
MAX_POINTS = 160  # of a training curve; more are averaged
MAX_X_LABELS = 16
MANY_POINTS = 40  # more have smaller dots
MARK_CHARACTER_WIDTH = 7.0  # pixels
LABEL_HEIGHT = 15.0  # pixels between two names at the right


class Series(msgspec.Struct, frozen=True):
    """values: None where there is none; hints: what a point says when it is pointed at."""

    name: str
    values: list[float | None]
    hints: list[str]


class Tick(msgspec.Struct, frozen=True):
    """Below one point of the horizontal axis: a label, and under it the day where that is another one than
    that of the tick before, else the time."""

    label: str
    day: str = ""
    time: str = ""


class Mark(msgspec.Struct, frozen=True):
    """A vertical line at a point. kind: a class of the page's style (breach, restore, accepted)."""

    at: int
    kind: str
    label: str


class Frame(msgspec.Struct, frozen=True):
    """Pixels of the plot and the values at its edges."""

    left: float
    top: float
    right: float
    bottom: float
    num_x: int
    low: float
    high: float

    def x(self, i: float) -> float:
        width = self.right - self.left
        return self.left + width * (i + 0.5) / max(1, self.num_x)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.low) / (self.high - self.low)


def line_chart(
    title: str,
    description: str,
    series: Sequence[Series],
    ticks: Sequence[Tick],
    marks: Sequence[Mark] = (),
    hollow: frozenset[int] = frozenset(),
) -> Markup:
    """One line for each series over the same points. hollow: points drawn as rings."""
    low, high = limits([value for one in series for value in one.values])
    steps = nice_ticks(low, high)
    width, height = 960, 340
    frame = Frame(52, 26, width - 150, height - 46, len(ticks), min(low, steps[0]), max(high, steps[-1]))
    parts = [_grid(frame, steps), _x_labels(frame, ticks), _marks(frame, marks)]
    ends = []
    for i, one in enumerate(series):
        colour = f"--c: var(--s{i % NUM_COLOURS + 1})"
        parts.append(Markup('<g style="{}">{}</g>').format(colour, _line(frame, one, hollow)))
        last = max((k for k, value in enumerate(one.values) if value is not None), default=None)
        if last is not None:
            ends.append((frame.y(one.values[last] or 0.0), one.name, colour))
    parts.append(_names(frame, ends))
    return _svg(width, height, title, description, parts)


def sparkline(title: str, description: str, values: Sequence[float | None]) -> Markup:
    """A training curve: loss over steps, with its first, last and extreme values in words."""
    values = thin(values, MAX_POINTS)
    low, high = limits(values)
    width, height = 300, 110
    frame = Frame(44, 10, width - 10, height - 14, len(values), low, high)
    hints = [""] * len(values)
    line = _line(frame, Series("", values, hints), frozenset(), with_dots=len(values) == 1)
    curve = Markup('<g style="--c: var(--s1)">{}</g>').format(line)
    return _svg(width, height, title, description, [_grid(frame, [low, high]), curve])


def limits(values: Sequence[float | None]) -> tuple[float, float]:
    """Of an axis that shows all of them, with room; a range also where they are all equal."""
    known = [value for value in values if value is not None and math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    room = (high - low) * 0.08 or max(abs(high) * 0.05, 0.05)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def nice_ticks(low: float, high: float, num_wanted: int = 5) -> list[float]:
    """Round numbers that cover low to high."""
    raw = (high - low) / num_wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def thin(values: Sequence[float | None], num_wanted: int) -> list[float | None]:
    """At most so many: means of neighbours. A piece in which any value is missing is missing."""
    if len(values) <= num_wanted:
        return list(values)
    edges = [len(values) * k // num_wanted for k in range(num_wanted + 1)]
    thinned: list[float | None] = []
    for start, end in pairwise(edges):
        piece = [value for value in values[start:end] if value is not None]
        thinned.append(math.fsum(piece) / len(piece) if len(piece) == end - start else None)
    return thinned


def _svg(width: int, height: int, title: str, description: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(width, height, title, title, description, Markup("").join(parts))


def _text(x: float, y: float, kind: str, text: str) -> Markup:
    return Markup('<text x="{}" y="{}" class="{}">{}</text>').format(_px(x), _px(y), kind, text)


def _grid(frame: Frame, steps: Sequence[float]) -> Markup:
    digits = _digits(steps)
    parts = []
    for value in steps:
        y = _px(frame.y(value))
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(line.format(_px(frame.left), _px(frame.right), y, y))
        parts.append(_text(frame.left - 8, frame.y(value) + 4, "tick end", f"{value:.{digits}f}"))
    return Markup("").join(parts)


def _x_labels(frame: Frame, ticks: Sequence[Tick]) -> Markup:
    every = max(1, math.ceil(len(ticks) / MAX_X_LABELS))
    parts, day = [], ""
    for i in range(0, len(ticks), every):
        tick = ticks[i]
        parts.append(_text(frame.x(i), frame.bottom + 18, "tick mid strong", tick.label))
        parts.append(
            _text(frame.x(i), frame.bottom + 34, "tick mid", tick.time if tick.day == day else tick.day)
        )
        day = tick.day
    return Markup("").join(parts)


def _marks(frame: Frame, marks: Sequence[Mark]) -> Markup:
    """The names of marks that stand close together are left to the pointer, all but the first."""
    parts, named_to = [], -math.inf
    for mark in marks:
        x = _px(frame.x(mark.at))
        line = Markup('<line class="mark {}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}</title></line>')
        parts.append(line.format(mark.kind, x, x, _px(frame.top), _px(frame.bottom), mark.label))
        half_width = MARK_CHARACTER_WIDTH * len(mark.label) / 2
        if frame.x(mark.at) - half_width > named_to:
            parts.append(_text(frame.x(mark.at), frame.top - 8, f"mid label {mark.kind}", mark.label))
            named_to = frame.x(mark.at) + half_width
    return Markup("").join(parts)


def _line(frame: Frame, one: Series, hollow: frozenset[int], *, with_dots: bool = True) -> Markup:
    path, is_down = [], False
    dots = []
    radius = 4 if frame.num_x <= MANY_POINTS else 2.5
    for i, value in enumerate(one.values):
        if value is None:
            is_down = False
            continue
        x, y = _px(frame.x(i)), _px(frame.y(value))
        path.append(f"L{x} {y}" if is_down else f"M{x} {y}h0")  # h0: a point alone is a round dot
        is_down = True
        if with_dots:
            kind = "dot hollow" if i in hollow else "dot" if radius == 4 else "dot small"
            dot = Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>')
            dots.append(dot.format(kind, x, y, radius, one.hints[i]))
    return Markup('<path class="line" d="{}"/>{}').format(" ".join(path), Markup("").join(dots))


def _names(frame: Frame, ends: list[tuple[float, str, str]]) -> Markup:
    """The series' names beside their last points, moved apart where they would meet."""
    parts, lowest = [], frame.top - LABEL_HEIGHT
    for y, name, colour in sorted(ends):
        lowest = max(y, lowest + LABEL_HEIGHT)
        short = name if len(name) <= 18 else f"{name[:17]}…"
        dot = Markup('<circle class="key" style="{}" cx="{}" cy="{}" r="4"/>')
        parts.append(dot.format(colour, _px(frame.right + 12), _px(lowest)))
        parts.append(_text(frame.right + 21, lowest + 4, "name", short))
    return Markup("").join(parts)


def _digits(steps: Sequence[float]) -> int:
    """Decimal places that tell neighbouring steps apart."""
    gap = min((b - a for a, b in pairwise(steps) if b > a), default=1.0)
    return min(6, max(0, -math.floor(math.log10(gap) + 1e-9) + (len(steps) == 2)))


def _px(value: float) -> str:
    return escape(f"{value:.1f}")
