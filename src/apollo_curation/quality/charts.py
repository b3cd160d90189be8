"""Line charts as SVG, by matplotlib: the extra `report`. Without it the page says how to get them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
from markupsafe import Markup, escape

MAX_POINTS = 160  # of a training curve; more are averaged
MAX_TICKS = 12
MARK_COLOURS = {"breach": "#d33", "restore": "#283", "accepted": "#888"}
GREY = "#808890"  # of text and frames, for a light page and a dark one
# Names come from outside: as text, never as mathematics. No date, equal ids at equal input.
STYLE: Any = {
    "text.usetex": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "apollo",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


class Series(msgspec.Struct, frozen=True):
    """values: None where there is none."""

    name: str
    values: Sequence[float | None]


class Mark(msgspec.Struct, frozen=True):
    """A vertical line at a point. kind: breach, restore, accepted."""

    at: int
    kind: str
    label: str


def line_chart(
    title: str,
    description: str,
    series: Sequence[Series],
    ticks: Sequence[str] = (),
    marks: Sequence[Mark] = (),
    hollow: Sequence[int] = (),
    size: tuple[float, float] = (10.0, 3.6),
) -> Markup:
    """One line for each series over the same points. ticks: a label for each point; hollow: points drawn as
    rings; size: in inches."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return Markup("<p>No chart: <code>pip install 'apollo-ipc[report]'</code> brings matplotlib.</p>")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for i, one in enumerate(series):
            values = [math.nan if value is None else value for value in one.values]
            colour = f"C{i % 10}"
            axes.plot(values, marker="o" if len(values) <= 40 else "", label=one.name, color=colour)
            rings = [at for at in hollow if one.values[at] is not None]
            axes.plot(rings, [values[at] for at in rings], "o", color=colour, markerfacecolor="white")
        for mark in marks:
            axes.axvline(mark.at, color=MARK_COLOURS[mark.kind], linestyle=":")
            axes.text(mark.at, 1.01, mark.label, color=MARK_COLOURS[mark.kind], ha="center", **_above(axes))
        every = max(1, math.ceil(len(ticks) / MAX_TICKS))
        if ticks:
            axes.set_xticks(range(0, len(ticks), every), [str(tick) for tick in ticks[::every]])
            figure.legend(loc="outside right upper", frameon=False)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = svg.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    head, _, rest = drawn.partition(">")
    told = Markup("<title>{}</title><desc>{}</desc>").format(title, description)
    return Markup(f'{head} role="img" aria-label="{escape(title)}">{told}{rest}')


def sparkline(title: str, description: str, values: Sequence[float | None]) -> Markup:
    """A training curve: loss over steps."""
    return line_chart(title, description, [Series("loss", thin(values, MAX_POINTS))], size=(3.2, 1.3))


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


def _above(axes: Any) -> dict[str, Any]:
    return {"transform": axes.get_xaxis_transform(), "va": "bottom", "fontsize": 8}
