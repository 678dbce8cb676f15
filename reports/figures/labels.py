"""Labels of figures: lines named at their ends and on them, and names shortened to the room that there is."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import findfont, get_font

from reports.figures.style import FONT, FONT_SIZE, Look
from reports.study.endings import one_line

CONNECTOR = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0}
"""How a direct label is joined to its line."""

LINE_HEIGHT = 1.25
"""Least distance of two direct labels, in font sizes."""


@dataclass(frozen=True)
class End:
    """A line to be named: the value at its end (NaN for a cell without any), its name and its colour."""

    value: float
    name: str
    colour: str


def label_ends(ax: Axes, ends: Sequence[End]) -> Axes:
    """Name lines at their ends, to the right of the axes and without overlap."""
    heights = [h if math.isfinite(h) else 0.0 for h in _axes_heights(ax, [end.value for end in ends])]
    for end, height, place in zip(ends, heights, spread(heights, _line_height(ax)), strict=True):
        ax.annotate(
            end.name,
            xy=(1.012, height),
            xytext=(1.045, place),
            xycoords="axes fraction",
            va="center",
            color=end.colour,
            arrowprops={"color": end.colour, **CONNECTOR} if math.isfinite(end.value) else None,
            annotation_clip=False,
            parse_math=False,
        )
    return ax


def label_lines(ax: Axes, ends: Sequence[End]) -> Axes:
    """Name reference lines on them, at the left; lines too close for two names share one place."""
    heights = _axes_heights(ax, [end.value for end in ends])
    rows: list[tuple[float, list[str]]] = []
    for height, end in sorted(zip(heights, ends, strict=True), key=lambda pair: -pair[0]):
        if rows and rows[-1][0] - height < _line_height(ax):
            rows[-1][1].append(end.name)
        else:
            rows.append((height, [end.name]))
    for height, names in rows:
        text = ", ".join(names)
        ax.text(0.02, height + 0.015, text, transform=ax.transAxes, color=ends[0].colour, fontsize=7, parse_math=False)
    return ax


def _axes_heights(ax: Axes, values: Sequence[float]) -> list[float]:
    """Where values stand on the y axis, from 0 to 1."""
    ax.autoscale_view()  # limits are set lazily
    to_axes = ax.transData + ax.transAxes.inverted()
    return [float(to_axes.transform((0, value))[1]) for value in values]


def _line_height(ax: Axes) -> float:
    """Height of a line of text as a share of the axes' height."""
    inches = matplotlib.rcParams["font.size"] * LINE_HEIGHT / 72
    return inches * ax.figure.dpi / ax.bbox.height


def cell_ends(frame: pd.DataFrame, look: Look) -> list[End]:
    """The last mean of every cell; NaN for a cell whose runs stopped before they had a value."""
    ends = []
    for cell in look.styles:
        own = frame[frame["cell"] == cell]
        mean = own[own["series"] == "mean"].dropna(subset=["value"])
        if len(mean) or (own["series"] == "stop").any():
            name = shorten(cell, label_width(look))
            value = float(mean["value"].iloc[-1]) if len(mean) else math.nan
            ends.append(End(value, name if len(mean) else f"{name}: no value", look.colour(cell)))
    return ends


def line_ends(frame: pd.DataFrame, look: Look) -> list[End]:
    """The reference lines."""
    lines = frame[frame["series"] == "line"]
    return [
        End(value, shorten(name, label_width(look)), look.theme.muted)
        for value, name in zip(lines["value"].astype(float), lines["cell"], strict=True)
    ]


def shorten(text: str, inches: float) -> str:
    """One line, its middle left out where it is too wide: labels of one study differ at their ends."""
    text = one_line(text)
    short, num_chars = text, len(text)
    while num_chars > 4 and text_width([short]) > inches:
        num_chars = min(num_chars, 200) - 1  # nothing of 200 letters fits anywhere
        tail = num_chars // 3
        short = f"{text[: num_chars - tail - 1]}…{text[-tail:]}"
    return short


def label_width(look: Look) -> float:
    """Width that a figure has for the longest name, in inches."""
    return 1.3 if look.is_narrow else 2.9


def text_width(names: Iterable[str]) -> float:
    """Width of the widest of some names in the figures' font and size, in inches."""
    return 1.1 * max([0.0, *map(_width, names)])  # at low resolutions, hinting widens letters by up to a tenth


@functools.lru_cache(maxsize=4096)
def _width(name: str) -> float:
    """Kept, because the variants of a figure, and its panels, have the same names."""
    font = get_font(findfont(FONT))
    font.set_size(FONT_SIZE, 72)
    font.set_text(name)
    return font.get_width_height()[0] / 64 / 72  # in 64ths of a point


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart to at least `gap`, as little as possible: neighbours that collide share their middle."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, int]] = []  # (sum of the heights that the group's middle stands for, size), upwards
    for i in order:
        total, size = heights[i], 1
        while groups and _lowest(total, size, gap) - _highest(*groups[-1], gap) < gap:
            below, below_size = groups.pop()
            total, size = total + below, size + below_size
        groups.append((total, size))
    placed = [_lowest(total, size, gap) + gap * k for total, size in groups for k in range(size)]
    result = [0.0] * len(heights)
    for i, place in zip(order, placed, strict=True):
        result[i] = place
    return result


def _lowest(total: float, size: int, gap: float) -> float:
    return total / size - gap * (size - 1) / 2


def _highest(total: float, size: int, gap: float) -> float:
    return total / size + gap * (size - 1) / 2
