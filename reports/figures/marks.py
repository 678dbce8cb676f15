"""Published marks in figures: numbered rings, with a key below the axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.figures.labels import text_width
from reports.figures.style import FONT_SIZE, Look

MARK_SIZE = 7
"""Size of the numbers beside marks and of their key, in points."""

NEAR = ((5, 0), (-5, 0), (0, 8), (0, -8), (5, 7), (-5, 7), (5, -7), (-5, -7))

MARK_PLACES = (*NEAR, (12, 0), (-12, 0), (0, 15), (0, -15), (12, 8), (-12, 8), (12, -8), (-12, -8))
"""Where a number may stand beside its mark, the best first: in points, to its nearer edge across and its middle up."""


def plot_marks(
    ax: Axes, frame: pd.DataFrame, look: Look, x: str, taken: Sequence[tuple[float, float]] | None = None
) -> Axes:
    """Published values as numbered rings, in the colour of our cell of the same method where there is one.

    Called when all else is drawn: the numbers keep clear of each other and of our points.

    Args:
        ax: where to draw.
        frame: rows of `series` published are drawn, with the number of each in `mark`.
        look: theme and the cells' styles.
        x: column of the x axis.
        taken: where else no number may stand, in points of the figure; by default our values in the frame.
    """
    marks = frame[frame["series"] == "published"]
    if marks.empty:
        return ax
    colours = [look.colour(cell) if cell in look.styles else look.theme.muted for cell in marks["cell"]]
    values = list(zip(marks[x].astype(float), marks["value"].astype(float), strict=True))
    ring: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markeredgewidth": 1.2, "zorder": 4, "clip_on": False}
    for (at, value), colour in zip(values, colours, strict=True):
        ax.plot([at], [value], linestyle="", color=colour, markerfacecolor=look.theme.background, **ring)
    if taken is None:
        ours = frame[frame["series"].isin(("mean", "seed"))].dropna(subset=["value"])
        taken = in_points(ax, list(zip(ours[x].astype(float), ours["value"].astype(float), strict=True)))
    names = [str(number) for number in marks["mark"]]
    places = free_places(in_points(ax, values), [0.62 * MARK_SIZE * len(name) for name in names], taken)
    for name, point, place, colour in zip(names, values, places, colours, strict=True):
        text = ax.annotate(name, point, place, textcoords="offset points", ha="center", va="center", zorder=5)
        text.set(fontsize=MARK_SIZE, color=colour, annotation_clip=False)
    return ax


def in_points(ax: Axes, values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where (x, y) values of the axes stand in the figure, in points."""
    ax.autoscale_view()  # limits are set lazily
    pixels = (ax.transData.transform(value) for value in values)
    return [(72 * float(a) / ax.figure.dpi, 72 * float(b) / ax.figure.dpi) for a, b in pixels]


def free_places(
    points: Sequence[tuple[float, float]], widths: Sequence[float], taken: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Where the middle of each point's label goes, from the point: the first place that covers no point or label.

    Where all are covered it is the one that covers least. All in points.
    """
    boxes = [(px, py, 5.0, 5.0) for px, py in (*points, *taken)]
    found = []
    for (px, py), width in zip(points, widths, strict=True):
        offsets = [(dx + math.copysign(width / 2, dx) if dx else 0.0, float(dy)) for dx, dy in MARK_PLACES]
        labels = [(px + dx, py + dy, width, float(MARK_SIZE)) for dx, dy in offsets]
        best = min(range(len(labels)), key=lambda i: (sum(_overlap(labels[i], box) for box in boxes), i))
        boxes.append(labels[best])
        found.append(offsets[best])
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (middle, width, height) share area."""
    return abs(a[0] - b[0]) < (a[2] + b[2]) / 2 and abs(a[1] - b[1]) < (a[3] + b[3]) / 2


@dataclass(frozen=True)
class MarkKey:
    """What the numbers of a figure's marks stand for: lines of text and their colours, to be drawn below its axes."""

    lines: Sequence[tuple[str, str]]

    @property
    def height(self) -> float:
        """In inches."""
        return (0.12 + 1.45 * MARK_SIZE / 72 * len(self.lines)) if self.lines else 0.0

    def draw(self, figure: Figure) -> None:
        """At the bottom of a figure that has room for it."""
        inches = figure.get_size_inches()
        for row, (text, colour) in enumerate(reversed(self.lines)):
            place = (0.1 / inches[0], (0.06 + 1.45 * MARK_SIZE / 72 * row) / inches[1])
            figure.text(*place, text, fontsize=MARK_SIZE, color=colour, va="bottom", parse_math=False)


def mark_key(frame: pd.DataFrame, look: Look, inches: float) -> MarkKey:
    """The key of a frame's marks, wrapped to a figure's width: number, method, values, source and protocol."""
    marks = frame[frame["series"] == "published"]
    lines: list[tuple[str, str]] = []
    for _, own in marks.groupby("mark") if len(marks) else ():
        values = ", ".join(f"{value:g}" for value in own["value"])
        first = own.iloc[0]
        text = f"{first['mark']}  {first['method']} {values}. {first['label']}"
        colour = look.colour(first["cell"]) if first["cell"] in look.styles else look.theme.muted
        lines += [(line, colour) for line in wrapped(text, inches * FONT_SIZE / MARK_SIZE)]
    return MarkKey(lines)


def wrapped(text: str, inches: float) -> list[str]:
    """Lines of text no wider than `inches` in the figures' font and size, all but the first indented."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1].strip() and text_width([longer]) > inches:
            longer = f"    {word}"
            lines.append("")
        lines[-1] = longer
    return lines
