"""Curves: one metric, several metrics, several clocks. Plot functions take `ax`, draw a curve frame
(reports/figures/curves.py) and return it. Nothing here uses pyplot or its global state.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from harness.records.metrics import METRICS, metric
from reports.figures.labels import cell_ends, label_ends, label_lines, label_width, line_ends, shorten, text_width
from reports.figures.marks import mark_key, plot_marks
from reports.figures.style import Look, rc
from reports.study.units import UNITS, short_number

LOG_RANGE = 10
"""A positive quantity, shares apart, whose largest value is this many times its smallest has a logarithmic axis."""

BAND_SEEDS = 3
"""Seeds from which the interval of a mean is shaded: over two it is 18 standard errors wide and hides the curves."""


MOST_POINTS = 40
"""Values of a curve that are marked one by one; more would run into each other, and every mark is drawn by itself."""


def plot_curves(ax: Axes, frame: pd.DataFrame, look: Look, width: float = 2, has_points: bool = True) -> Axes:
    """Every seed as a thin line, means as thick ones (dotted over fewer seeds than the cell has), reference lines.

    Intervals of means over `BAND_SEEDS` seeds or more are shaded, as far as the axes reach for the lines. A cross
    marks where a run diverged or failed: at its last value, at the bottom where it has none.

    Args:
        ax: where to draw.
        frame: a curve frame of one quantity.
        look: theme and the cells' styles.
        width: of the mean lines, in points.
        has_points: mark every value, where no curve has more than `MOST_POINTS`.
    """
    _scale(ax, frame, look)
    x = look.unit.clock
    for value in frame.loc[frame["series"] == "line", "value"].astype(float):
        ax.axhline(value, color=look.theme.muted, linewidth=1, dashes=(4, 3), zorder=1)
    parts = _parts(frame, x)
    longest = max((len(part["value"]) for (series, _), part in parts.items() if series == "mean"), default=0)
    nothing = dict.fromkeys([x, *NUMBERS], np.empty(0))
    for cell, style in look.styles.items():
        colour = style.colour(look.theme)
        seeds, means = (parts.get((series, cell), nothing) for series in ("seed", "mean"))
        marker = style.marker if has_points and longest <= MOST_POINTS else ""
        line = ax.plot(*_broken(seeds, x), color=colour, linewidth=0.4 * width, alpha=0.5)[0]
        line.set(marker=marker, markersize=1.5 * width, markeredgewidth=0, zorder=2)
        mean = {"color": colour, "linewidth": width, "marker": marker, "markersize": 2.2 * width, "zorder": 3}
        _plot_mean(ax, means, x, mean, style.dashes)
        _plot_band(ax, means, x, colour)
    _plot_stops(ax, frame[frame["series"] == "stop"], look, width)
    ax.set_xlim(0, float(frame[x].max()))
    return ax


Part = Mapping[str, np.ndarray]
"""Columns of a cell's rows of one series, as float64."""

NUMBERS = ("seed", "value", "low", "high", "num_seeds", "of_seeds")
"""Columns that a part has beside its clock."""


def _parts(frame: pd.DataFrame, x: str) -> dict[tuple[str, str], Part]:
    """Rows by series and cell. Taken from arrays, as each look into a frame takes as long as drawing its line."""
    columns = {name: frame[name].to_numpy(float, na_value=np.nan) for name in (x, *NUMBERS)}
    rows: Any = frame.groupby(["series", "cell"]).indices  # pandas-stubs know no keys of two names
    return {key: {name: column[own] for name, column in columns.items()} for key, own in rows.items()}


def _broken(seeds: Part, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of all seeds as one line that breaks between them: an artist a seed takes ten times as long."""
    order = np.argsort(seeds["seed"], kind="stable")
    breaks = 1 + np.flatnonzero(np.diff(seeds["seed"][order]))
    places, values = (np.insert(seeds[name][order], breaks, np.nan) for name in (x, "value"))
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


def _plot_mean(ax: Axes, means: Part, x: str, mean: dict[str, Any], dashes: Sequence[float]) -> None:
    is_whole, values = means["num_seeds"] == means["of_seeds"], means["value"]
    line = ax.plot(means[x], np.where(is_whole, values, np.nan), clip_on=False, **mean)[0]
    if dashes:
        line.set_dashes(dashes)
    if not is_whole.all():
        # The dotted stretch begins at the last mean over all seeds, so that the two join.
        is_next_whole = np.append(is_whole[1:], True)
        joined = np.where(is_whole & is_next_whole, np.nan, values)
        ax.plot(means[x], joined, linestyle=":", **{**mean, "marker": ""})


def _plot_band(ax: Axes, means: Part, x: str, colour: str) -> None:
    """The intervals of the means, shaded; as an artist that leaves the axes' limits alone."""
    is_known = (means["num_seeds"] >= BAND_SEEDS) & ~np.isnan(means["low"])
    if is_known.sum() < 2:
        return
    places, low, high = (means[name][is_known] for name in (x, "low", "high"))
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
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


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


def bands_remark(frame: pd.DataFrame) -> str:
    """What a caption says of the shaded intervals of a curve frame; "" where there are none."""
    has_bands = (frame["num_seeds"] >= BAND_SEEDS).any()
    return " Shaded: the means’ 95% Student-t intervals, as far as the axes reach." if has_bands else ""


def stops_remark(frame: pd.DataFrame) -> str:
    """What a caption says of the runs that stopped early; "" where none did."""
    text = " A cross marks where a run diverged or failed: at its last value, or at the bottom where it has none."
    return text if (frame["series"] == "stop").any() else ""


RIGHT = 0.18
"""Room for half of the last tick's number, in inches."""


def _panels(num: int, look: Look, has_labels: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `num` panels below a key. Placed by hand: a layout engine takes longer than all the drawing.

    The budget's unit stands below the last row, or there is room for a label below every panel.
    """
    num_columns = 1 if look.is_narrow else min(3, num)
    num_rows = math.ceil(num / num_columns)
    width, panel_height, key_height = 4.2 if look.is_narrow else 8.4, 1.6, 0.22 * _key_rows(look) + 0.42
    left, gap, row_gap, bottom = 0.5, 0.52, 0.82 if has_labels else 0.62, 0.42
    panel_width = (width - left - RIGHT - gap * (num_columns - 1)) / num_columns
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
