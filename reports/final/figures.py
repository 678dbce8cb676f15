"""Figures of the final evaluation: values with intervals, and values against images seen beside published marks."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from reports.figures.labels import End, label_ends, label_width, line_ends, shorten, text_width
from reports.figures.lines import LOG_RANGE, metric_title, scale_values
from reports.figures.marks import in_points, mark_key, plot_marks
from reports.figures.style import Look, rc
from reports.statistics.intervals import t_interval
from reports.study.load import Study
from reports.study.units import short_number
from reports.tables.results import CellResult

VALUE_COLUMNS = ["quantity", "series", "cell", "seed", "images", "value", "low", "high"]
"""Columns of a value frame."""


# -- frames ---------------------------------------------------------------------------------------------------------


def value_frame(study: Study, rows: Iterable[CellResult], name: str) -> pd.DataFrame:
    """A metric at the compared point: a row per seed, and per cell a row `mean` with its 95% Student-t interval.

    `images` were seen by then; rows of `series` line are the study's reference lines.
    """
    lines: list[dict[str, Any]] = []
    for row in rows:
        finite = row.metrics[name].finite
        if not finite:
            continue
        images = {run.seed: line["images"] for run in study.of(row.cell) if (line := run.evaluation(study.point))}
        lines += [
            {"series": "seed", "cell": row.cell, "seed": seed, "images": images[seed], "value": value}
            for seed, value in finite.items()
        ]
        interval = t_interval(list(finite.values()))
        mean = {"value": interval.mean, "low": interval.low, "high": interval.high}
        at = sum(images[seed] for seed in finite) / len(finite)
        lines.append({"series": "mean", "cell": row.cell, "images": at, **mean})
    lines += [{"series": "line", "cell": label, "value": value} for label, value in study.lines(name).items()]
    frame = pd.DataFrame([{"quantity": name, **line} for line in lines], columns=VALUE_COLUMNS)
    return frame.astype({"seed": "Int64"})


# -- values ---------------------------------------------------------------------------------------------------------


def plot_values(ax: Axes, frame: pd.DataFrame, look: Look) -> Axes:
    """Per cell a row: a bar from 0 to the mean, every seed's value as a dot, the mean's interval as a line.

    Reference lines are dashed and named above the axes.
    """
    means = frame[frame["series"] == "mean"]
    cells = list(means["cell"])
    for place, cell in enumerate(reversed(cells)):
        colour = look.colour(cell)
        mean = means[means["cell"] == cell].iloc[0]
        seeds = frame[(frame["series"] == "seed") & (frame["cell"] == cell)]
        ax.barh([place], [mean["value"]], height=0.62, color=colour, alpha=0.28, zorder=1)
        ax.plot([mean["value"]] * 2, [place - 0.31, place + 0.31], color=colour, linewidth=2.5, zorder=3)
        if math.isfinite(mean["low"]):
            ax.plot([mean["low"], mean["high"]], [place, place], color=colour, linewidth=2, zorder=2)
        dots: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markeredgecolor": look.theme.background}
        ax.plot(seeds["value"], [place] * len(seeds), linestyle="", color=colour, zorder=4, **dots)
    ax.set_yticks(range(len(cells)))
    labels = ax.set_yticklabels([shorten(cell, label_width(look)) for cell in reversed(cells)])
    for label, cell in zip(labels, reversed(cells), strict=True):
        label.set(color=look.colour(cell), parse_math=False)
    ax.set_ylim(-0.6, len(cells) - 0.4)
    ax.grid(False)
    ax.grid(True, axis="x")
    return _plot_lines(ax, line_ends(frame, look))


def _plot_lines(ax: Axes, ends: Sequence[End]) -> Axes:
    """Vertical lines with their names on top; names that would run into each other share a place."""
    rows: list[tuple[float, list[str]]] = []
    for end in sorted(ends, key=lambda end: end.value):
        ax.axvline(end.value, color=end.colour, linewidth=1, dashes=(4, 3), zorder=1.5)
    ax.autoscale_view()
    for end in sorted(ends, key=lambda end: end.value):
        place = float((ax.transData + ax.transAxes.inverted()).transform((end.value, 0))[0])
        inches = (place - rows[-1][0]) * ax.bbox.width / ax.figure.dpi if rows else math.inf
        if inches < text_width(rows[-1][1] if rows else []):
            rows[-1][1].append(end.name)
        else:
            rows.append((place, [end.name]))
    for place, names in rows:
        text = ax.text(place, 1.0, ", ".join(names), transform=ax.transAxes, color=ends[0].colour, va="bottom")
        text.set(fontsize=7, parse_math=False)
    return ax


def values_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """One metric of all cells."""
    name = frame["quantity"].iloc[0]
    cells = frame.loc[frame["series"] == "mean", "cell"]
    with matplotlib.rc_context(rc(look.theme)):
        width, height = 4.2 if look.is_narrow else 8.4, 0.95 + 0.42 * len(cells)
        left = 0.15 + text_width(shorten(cell, label_width(look)) for cell in cells)
        figure = Figure(figsize=(width, height))
        ax = figure.add_axes((left / width, 0.3 / height, 1 - (left + 0.15) / width, 1 - 0.8 / height))
        plot_values(ax, frame, look)
        metric_title(ax, name, look, pad=16)
    return figure


# -- against images -------------------------------------------------------------------------------------------------


ASIDE = 9
"""How far right of their images our values stand, and the marks of papers at the images themselves, in points."""


def plot_against_images(ax: Axes, frame: pd.DataFrame, look: Look) -> Axes:
    """Ours right beside the images that the runs saw, means with intervals and seeds as small dots; and the marks."""
    _scales(ax, frame, look)
    taken: list[tuple[float, float]] = []
    for place, cell in enumerate(frame.loc[frame["series"] == "mean", "cell"]):
        aside = ASIDE + 6 * place
        own = frame[frame["cell"] == cell]
        seeds, mean = own[own["series"] == "seed"], own[own["series"] == "mean"].iloc[0]
        beside = ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
        style: dict[str, Any] = {"color": look.colour(cell), "transform": ax.transData + beside, "zorder": 5}
        ax.plot(seeds["images"].astype(float), seeds["value"], linestyle="", marker="o", markersize=2.5, **style)
        ends = [mean["low"], mean["high"]] if math.isfinite(mean["low"]) else [mean["value"]] * 2
        ax.plot([mean["images"]] * 2, ends, linewidth=1.4, **style)
        ax.plot([mean["images"]], [mean["value"]], marker=look.styles[cell].marker, markersize=6.5, **style)
        taken += [(x + aside, y) for x, y in _along(ax, mean["images"], *ends)]
    return plot_marks(ax, frame, look, "images", taken)


def _along(ax: Axes, x: float, low: float, high: float) -> list[tuple[float, float]]:
    """Points along a vertical line, close enough to keep labels off it; in points of the figure."""
    (place, bottom), (_, top) = in_points(ax, [(x, low), (x, high)])
    num = 1 + math.ceil((top - bottom) / 4)
    return [(place, bottom + (top - bottom) * i / num) for i in range(num + 1)]


def _scales(ax: Axes, frame: pd.DataFrame, look: Look) -> None:
    """Logarithmic images where they range widely, with room for our values at the right; values as in the curves."""
    images = frame["images"].dropna().astype(float)
    least, most = float(images.min()), float(images.max())
    is_log = least > 0 and most >= LOG_RANGE * least
    if is_log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3) if look.is_narrow else (1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    first, last = (math.log(least), math.log(most)) if is_log else (least, most)
    left = first - (0.06 * (last - first) or 0.1 * abs(last))
    aside = (ASIDE + 6 * frame.loc[frame["series"] == "mean", "cell"].nunique()) / 72
    right = left + (last - left) / (1 - min(aside * ax.figure.dpi / ax.bbox.width, 0.5))
    ax.set_xlim(*((math.exp(left), math.exp(right)) if is_log else (left, right)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    scale_values(ax, frame)
    # All at once, as places in points hold for the limits that all values give.
    bounds = frame[["low", "high"]].stack().dropna()
    ax.update_datalim([(most, value) for value in (*frame["value"].dropna(), *bounds)])


def images_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """One metric against images seen, ours directly labelled, with the key of the published marks."""
    name = frame["quantity"].iloc[0]
    with matplotlib.rc_context(rc(look.theme)):
        width, height, left = (4.2, 3.9, 0.54) if look.is_narrow else (8.4, 4.3, 0.63)
        key = mark_key(frame, look, width - 0.2)
        means = frame[frame["series"] == "mean"]
        ends = [_end(cell, value, look) for cell, value in zip(means["cell"], means["value"], strict=True)]
        right = 0.3 + text_width(end.name for end in ends)
        whole = height + key.height
        figure = Figure(figsize=(width, whole))
        box = (left / width, (0.5 + key.height) / whole, 1 - (left + right) / width, (height - 0.95) / whole)
        ax = figure.add_axes(box)
        plot_against_images(ax, frame, look)
        key.draw(figure)
        label_ends(ax, ends)
        metric_title(ax, name, look)
        ax.set_xlabel("images")
    return figure


def _end(cell: str, value: float, look: Look) -> End:
    return End(value, shorten(cell, label_width(look)), look.colour(cell))
