"""Figures of paired differences to the baseline."""

import math
from collections.abc import Sequence

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.records.metrics import metric
from reports.figures.labels import label_width, shorten, text_width
from reports.figures.style import Look, rc
from reports.tables.results import CellResult


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
