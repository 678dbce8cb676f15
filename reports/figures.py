"""Figures. Plot functions take `ax`, draw a curve frame (reports/curves.py) and return it; every figure that is saved
has beside it the CSV it was drawn from. Nothing here uses pyplot or its global state.
"""

import io
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from harness.records import METRICS, metric
from reports.endings import one_line
from reports.style import FONT, FONT_SIZE, Look, rc
from reports.tables import CellResult
from reports.units import UNITS, short_number

DPI = 200
LOG_RANGE = 10
"""A positive quantity, shares apart, whose largest value is this many times its smallest has a logarithmic axis."""

BAND_SEEDS = 3
"""Seeds from which the interval of a mean is shaded: over two it is 18 standard errors wide and hides the curves."""

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


# -- curves ---------------------------------------------------------------------------------------------------------


def plot_curves(ax: Axes, frame: pd.DataFrame, look: Look, width: float = 2, has_points: bool = True) -> Axes:
    """Every seed as a thin line, means as thick ones (dotted over fewer seeds than the cell has), reference lines.

    Intervals of means over `BAND_SEEDS` seeds or more are shaded, as far as the axes reach for the lines. A cross
    marks where a run diverged or failed: at its last value, at the bottom where it has none.

    Args:
        ax: where to draw.
        frame: a curve frame of one quantity.
        look: theme and the cells' styles.
        width: of the mean lines, in points.
        has_points: mark every value; for curves of few points.
    """
    _scale(ax, frame, look)
    x = look.unit.clock
    for value in frame.loc[frame["series"] == "line", "value"].astype(float):
        ax.axhline(value, color=look.theme.muted, linewidth=1, dashes=(4, 3), zorder=1)
    parts = dict(iter(frame.groupby(["series", "cell"])))
    for cell, style in look.styles.items():
        colour = style.colour(look.theme)
        seeds, means = (parts.get((series, cell), frame[:0]) for series in ("seed", "mean"))
        marker = style.marker if has_points else ""
        line = ax.plot(*_broken(seeds, x), color=colour, linewidth=0.4 * width, alpha=0.5)[0]
        line.set(marker=marker, markersize=1.5 * width, markeredgewidth=0, zorder=2)
        mean = {"color": colour, "linewidth": width, "marker": marker, "markersize": 2.2 * width, "zorder": 3}
        _plot_mean(ax, means, x, mean, style.dashes)
        _plot_band(ax, means, x, colour)
    _plot_stops(ax, frame[frame["series"] == "stop"], look, width)
    ax.set_xlim(0, float(frame[x].max()))
    return ax


def _broken(seeds: pd.DataFrame, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of all seeds as one line that breaks between them: an artist a seed takes ten times as long."""
    ordered = seeds.sort_values("seed", kind="stable")
    breaks = 1 + np.flatnonzero(np.diff(ordered["seed"].to_numpy(int)))
    places, values = (np.insert(ordered[name].to_numpy(float), breaks, np.nan) for name in (x, "value"))
    return places, values


def _plot_stops(ax: Axes, stops: pd.DataFrame, look: Look, width: float) -> None:
    """Crosses in the colours of the cells; those without a value stand at the bottom, a row for every cell."""
    rows = {cell: row for row, cell in enumerate(stops.loc[stops["value"].isna(), "cell"].unique())}
    for cell, x, value in zip(stops["cell"], stops[look.unit.clock].astype(float), stops["value"], strict=True):
        has_value = math.isfinite(value)
        ax.plot(
            [x],
            [value if has_value else 0.03 + 0.05 * rows[cell]],
            transform=ax.transData if has_value else ax.get_xaxis_transform(),
            color=look.colour(cell),
            linestyle="",
            marker="x",
            markersize=3 + 2 * width,
            markeredgewidth=1.8,
            zorder=5,
            clip_on=False,
        )


def _plot_mean(ax: Axes, frame: pd.DataFrame, x: str, mean: dict[str, Any], dashes: Sequence[float]) -> None:
    is_whole = frame["num_seeds"] == frame["of_seeds"]
    line = ax.plot(frame[x], frame["value"].where(is_whole), clip_on=False, **mean)[0]
    if dashes:
        line.set_dashes(dashes)
    if not is_whole.all():
        # The dotted stretch begins at the last mean over all seeds, so that the two join.
        joined = frame["value"].where(~is_whole | ~is_whole.shift(-1, fill_value=True))
        ax.plot(frame[x], joined, linestyle=":", **{**mean, "marker": ""})


def _plot_band(ax: Axes, means: pd.DataFrame, x: str, colour: str) -> None:
    """The intervals of the means, shaded; as an artist that leaves the axes' limits alone."""
    known = means[(means["num_seeds"] >= BAND_SEEDS) & means["low"].notna()]
    if len(known) < 2:
        return
    places, low, high = (known[name].to_numpy(float) for name in (x, "low", "high"))
    if ax.get_yscale() == "log":
        low = np.maximum(low, 1e-3 * high)  # what is below 0 is below the axis
    outline = np.concatenate([np.stack([places, low], axis=1), np.stack([places, high], axis=1)[::-1]])
    ax.add_artist(Polygon(outline, closed=True, facecolor=colour, alpha=0.14, linewidth=0, zorder=1.5))


def _scale(ax: Axes, frame: pd.DataFrame, look: Look) -> None:
    """Logarithmic where the values ask for it; whole steps on the x axis."""
    scale_values(ax, frame)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 4, 5, 10), integer=look.unit.is_whole))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def scale_values(ax: Axes, frame: pd.DataFrame) -> None:
    """A logarithmic y axis where the values ask for it, with plain numbers at the ticks.

    Metrics of which more is better are shares, and stay linear.
    """
    values = frame["value"].dropna()
    is_share = _direction(frame["quantity"].iloc[0]) == "higher"
    if not is_share and len(values) and values.min() > 0 and values.max() >= LOG_RANGE * values.min():
        ax.set_yscale("log")
        is_long = values.max() > 200 * values.min()
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if is_long else (1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


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
    font = get_font(findfont(FONT))
    font.set_size(FONT_SIZE, 72)
    widths = [0.0]
    for name in names:
        font.set_text(name)
        widths.append(font.get_width_height()[0] / 64 / 72)  # in 64ths of a point
    return 1.1 * max(widths)  # at low resolutions, hinting widens letters by up to a tenth


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


# -- published marks ------------------------------------------------------------------------------------------------

MARK_SIZE = 7
"""Of the numbers beside marks and of their key, in points."""

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


# -- differences ----------------------------------------------------------------------------------------------------


def difference_frame(rows: Sequence[CellResult], name: str) -> pd.DataFrame:
    """Paired differences of a metric: a row per seed, and per cell a row `mean` with its interval."""
    lines = []
    for row in rows:
        difference = row.metrics[name].difference
        if difference and difference.interval.num:
            seeds = [{"series": "seed", "seed": seed, "value": value} for seed, value in difference.by_seed.items()]
            interval = difference.interval
            mean = {"series": "mean", "value": interval.mean, "low": interval.low, "high": interval.high}
            lines += [{"quantity": name, "cell": row.cell, **line} for line in (*seeds, mean)]
    columns = ["quantity", "series", "cell", "seed", "value", "low", "high"]
    return pd.DataFrame(lines, columns=columns).astype({"seed": "Int64"})


def plot_differences(ax: Axes, frame: pd.DataFrame, look: Look) -> Axes:
    """Per cell a row: every seed's difference as a dot, the mean as a tick, its interval as a line; 0 is no change."""
    cells = list(dict.fromkeys(frame["cell"]))
    ax.axvline(0, color=look.theme.text, linewidth=1, zorder=1)
    for place, cell in enumerate(reversed(cells)):
        colour = look.colour(cell)
        own = frame[frame["cell"] == cell]
        seeds, mean = own[own["series"] == "seed"], own[own["series"] == "mean"].iloc[0]
        if math.isfinite(mean["low"]):
            ax.plot([mean["low"], mean["high"]], [place, place], color=colour, linewidth=2, zorder=2)
        ax.plot([mean["value"]], [place], color=colour, marker="|", markersize=14, markeredgewidth=2.5, zorder=3)
        ax.plot(
            seeds["value"],
            [place] * len(seeds),
            linestyle="",
            marker="o",
            markersize=5.5,
            color=colour,
            markeredgecolor=look.theme.background,
            zorder=4,
        )
    ax.set_yticks(range(len(cells)))
    labels = ax.set_yticklabels([shorten(cell, label_width(look)) for cell in reversed(cells)])
    for label, cell in zip(labels, reversed(cells), strict=True):
        label.set(color=look.colour(cell), parse_math=False)
    ax.set_ylim(-0.6, len(cells) - 0.4)
    ax.grid(False)
    ax.grid(True, axis="x")
    return ax


# -- whole figures --------------------------------------------------------------------------------------------------

Draw = Callable[[Look], Figure]
"""A figure that can be drawn for any page."""


def metric_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """One metric against the budget's clock, directly labelled, with a key of the published marks it may have."""
    name = frame["quantity"].iloc[0]
    with matplotlib.rc_context(rc(look.theme)):
        width, height, left = (4.2, 3.7, 0.54) if look.is_narrow else (8.4, 4.3, 0.63)
        ends = cell_ends(frame, look) + line_ends(frame, look)
        right = 0.3 + text_width(end.name for end in ends)
        key = mark_key(frame, look, width - 0.2)
        whole = height + key.height
        figure = Figure(figsize=(width, whole))
        box = (left / width, (0.12 * height + key.height) / whole, 1 - (left + right) / width, 0.77 * height / whole)
        ax = figure.add_axes(box)
        plot_curves(ax, frame, look)
        plot_marks(ax, frame, look, look.unit.clock)
        key.draw(figure)
        label_ends(ax, ends)
        metric_title(ax, name, look)
        ax.set_xlabel(look.unit.words)
    return figure


def metric_title(ax: Axes, name: str, look: Look, pad: float | None = None) -> None:
    """The metric's title, its recorded name and its better direction; `pad` is its distance to the axes in points."""
    family = metric(name)
    ax.set_title(family.title, color=look.theme.text, pad=pad)
    better = f", {family.direction} is better"
    # Both titles share a line; the left one is larger and bold.
    left = ax.bbox.width / ax.figure.dpi - 1.3 * text_width([family.title]) - text_width([better])
    text = _arrow(name) if look.is_narrow else f"{shorten(name, left)}{better}"
    shown = ax.set_title(text, loc="right", color=look.theme.muted, fontsize=8, fontweight="normal", pad=pad)
    shown.set_parse_math(False)


def panels_figure(frame: pd.DataFrame, look: Look, has_points: bool = True) -> Figure:
    """Small multiples, a panel for every quantity of a curve frame, with one key for all."""
    names = list(dict.fromkeys(frame["quantity"]))
    with matplotlib.rc_context(rc(look.theme)):
        figure, axes = _panels(len(names), look)
        for ax, name in zip(axes, names, strict=True):
            own = frame[frame["quantity"] == name]
            plot_curves(ax, own, look, width=1.4, has_points=has_points)
            label_lines(ax, line_ends(own, look))
            _panel_title(ax, name, look)
        _key(figure, look)
    return figure


def clocks_figure(frame: pd.DataFrame, look: Look, not_comparable: Collection[str]) -> Figure:
    """One metric against several clocks, a panel for each, with one key for all.

    Args:
        frame: curve frames with a column `unit`.
        look: theme and the cells' styles.
        not_comparable: units against which the cells may not be compared, which their axes say.
    """
    units = [UNITS[name] for name in dict.fromkeys(frame["unit"])]
    with matplotlib.rc_context(rc(look.theme)):
        figure, axes = _panels(len(units), look, has_labels=True)
        for ax, unit in zip(axes, units, strict=True):
            own = frame[frame["unit"] == unit.name]
            plot_curves(ax, own, replace(look, unit=unit), width=1.4)
            _panel_title(ax, own["quantity"].iloc[0], look)
            ax.set_xlabel(f"{unit.words}, not comparable" if unit.name in not_comparable else unit.words)
        _key(figure, look)
    return figure


def _panels(num: int, look: Look, has_labels: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `num` panels below a key. Placed by hand: a layout engine takes longer than all the drawing.

    The budget's unit stands below the last row, or there is room for a label below every panel.
    """
    num_columns = 1 if look.is_narrow else min(3, num)
    num_rows = math.ceil(num / num_columns)
    width, panel_height, key_height = 4.2 if look.is_narrow else 8.4, 1.6, 0.22 * _key_rows(look) + 0.42
    left, gap, row_gap, bottom = 0.5, 0.52, 0.82 if has_labels else 0.62, 0.42
    panel_width = (width - left - 0.14 - gap * (num_columns - 1)) / num_columns
    height = key_height + num_rows * panel_height + (num_rows - 1) * row_gap + bottom
    figure = Figure(figsize=(width, height))
    axes = []
    for row, column in (divmod(i, num_columns) for i in range(num)):
        x = left + column * (panel_width + gap)
        y = height - key_height - panel_height - row * (panel_height + row_gap)
        axes.append(figure.add_axes((x / width, y / height, panel_width / width, panel_height / height)))
        if row == num_rows - 1 and not has_labels:
            axes[-1].set_xlabel(look.unit.words)
    return figure, axes


def _arrow(name: str) -> str:
    return "↓ is better" if metric(name).direction == "lower" else "↑ is better"


def _direction(name: str) -> str:
    """The better direction of a metric, "" for what is none."""
    return metric(name).direction if any(name.startswith(family.prefix) for family in METRICS) else ""


def _panel_title(ax: Axes, name: str, look: Look) -> None:
    if _direction(name):
        ax.set_title(metric(name).title, color=look.theme.text, fontsize=9)
        ax.set_title(_arrow(name), loc="right", color=look.theme.muted, fontsize=7, fontweight="normal")
    else:
        ax.set_title(shorten(name, ax.bbox.width / ax.figure.dpi), color=look.theme.text, fontsize=9, parse_math=False)


def _key_columns(look: Look) -> int:
    """As many columns as the longest name leaves room for."""
    width = 0.6 + text_width(shorten(cell, label_width(look)) for cell in look.styles)
    return max(1, min(len(look.styles), int((4.2 if look.is_narrow else 8.4) / width)))


def _key_rows(look: Look) -> int:
    return math.ceil(len(look.styles) / _key_columns(look))


def _key(figure: Figure, look: Look) -> None:
    """A legend of the cells at the top. Names go in afterwards: a legend drops labels that begin with `_`."""
    handles = [
        Line2D([], [], color=look.colour(cell), linewidth=2, marker=style.marker, markersize=4.5)
        for cell, style in look.styles.items()
    ]
    numbers = [str(i) for i in range(len(handles))]
    legend = figure.legend(
        handles, numbers, loc="upper left", ncols=_key_columns(look), borderaxespad=0.2, handlelength=1.6
    )
    for text, cell in zip(legend.get_texts(), look.styles, strict=True):
        text.set(text=shorten(cell, label_width(look)), parse_math=False, color=look.theme.text)


def differences_figure(frame: pd.DataFrame, look: Look, baseline: str) -> Figure:
    """Paired differences of one metric to the baseline."""
    name = frame["quantity"].iloc[0]
    num_cells = frame["cell"].nunique()
    with matplotlib.rc_context(rc(look.theme)):
        width, height = 4.2 if look.is_narrow else 8.4, 1.0 + 0.42 * num_cells
        left = 0.15 + text_width(shorten(cell, label_width(look)) for cell in frame["cell"].unique())
        figure = Figure(figsize=(width, height))
        ax = figure.add_axes((left / width, 0.5 / height, 1 - (left + 0.1) / width, 1 - 0.86 / height))
        plot_differences(ax, frame, look)
        title = f"Difference to {shorten(baseline, 1.4)}, paired by seed"
        ax.set_title(title, color=look.theme.text, parse_math=False)
        better = f"{'left' if metric(name).direction == 'lower' else 'right'} of 0 is better"
        ax.set_xlabel(better if look.is_narrow else f"{shorten(name, 4)}: {better}")
        ax.xaxis.label.set_parse_math(False)
    return figure


# -- files ----------------------------------------------------------------------------------------------------------


def png(figure: Figure) -> bytes:
    """The figure as PNG, without a date: equal records give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save(draw: Draw, frame: pd.DataFrame, stem: Path, look: Look) -> list[Path]:
    """Write `<stem>.png`, `<stem>.svg`, `<stem>.pdf` and the `<stem>.csv` that they were drawn from, without dates."""
    figure = draw(look)
    image, vector, printed, data = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg", "pdf", "csv"))
    image.write_bytes(png(figure))
    with matplotlib.rc_context(rc(look.theme)):
        figure.savefig(vector, format="svg", metadata={"Date": None})
        figure.savefig(printed, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    frame.to_csv(data, index=False)
    return [image, vector, printed, data]
