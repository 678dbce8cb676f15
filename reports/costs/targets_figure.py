"""The figure of costs to a target: a panel for every clock, a row for every cell, a dot for every seed."""

import math
from collections.abc import Sequence

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports.costs.targets_costs import CellCost
from reports.figures.labels import shorten, text_width
from reports.figures.style import Look, rc
from reports.study.units import UNITS, short_number

COLUMNS = ["metric", "target", "unit", "cell", "series", "seed", "outcome", "cost", "low", "high", "spent"]
"""Columns of the frame. A `seed` has its outcome and, where it reached the target, its cost; `mean` is the geometric
mean over the seeds, where all reached it, with its interval; `baseline` the cost of the baseline's median curve;
`spent` is what a run had spent at its last evaluation."""


def cost_frame(name: str, target: float, costs: Sequence[CellCost]) -> pd.DataFrame:
    """What the figure of a target is drawn from."""
    rows = []
    for cost in costs:
        for unit, clock in cost.clocks.items():
            place = {"metric": name, "target": target, "unit": unit, "cell": cost.cell}
            rows += [
                place
                | {"series": "seed", "seed": seed, "outcome": each.kind, "spent": each.spent(clock.unit)}
                | {"cost": each.cost(clock.unit)}
                for seed, each in clock.outcomes.items()
            ]
            if math.isfinite(clock.speedup.low):
                bounds = {"low": clock.reference / clock.speedup.high, "high": clock.reference / clock.speedup.low}
                rows.append(place | {"series": "mean", "cost": clock.reference / clock.speedup.mean, **bounds})
            if cost is costs[0] and math.isfinite(clock.reference):
                rows.append(place | {"series": "baseline", "cost": clock.reference})
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64"})


STACK, STACK_HEIGHT = 0.2, 0.7
"""Distance of dots that would hide each other, and the most that a pile of them takes up, in rows."""


def stacked(values: Sequence[float], gap: float) -> list[float]:
    """How many rows each value moves up, so that those within `gap` of their neighbour are a pile, the first on top."""
    moves, groups = [0.0] * len(values), list[list[int]]()
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        if groups and values[i] - values[groups[-1][-1]] < gap:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        step = min(STACK, STACK_HEIGHT / max(len(group) - 1, 1))
        for place, i in enumerate(sorted(group)):
            moves[i] = step * ((len(group) - 1) / 2 - place)
    return moves


def plot_costs(ax: Axes, frame: pd.DataFrame, look: Look, has_labels: bool = True) -> Axes:
    """One clock: every seed's cost, the mean and its interval, the baseline's cost as a line, misses at the edge."""
    cells = list(dict.fromkeys(frame["cell"]))[::-1]
    for cost in frame.loc[frame["series"] == "baseline", "cost"]:
        ax.axvline(cost, color=look.theme.muted, linewidth=1, dashes=(4, 3), zorder=1)
    for place, cell in enumerate(cells):
        own, colour = frame[frame["cell"] == cell], look.colour(cell)
        for mean in own[own["series"] == "mean"].itertuples():
            ax.plot([mean.low, mean.high], [place, place], color=colour, linewidth=2, zorder=2)
            ax.plot([mean.cost], [place], color=colour, marker="|", markersize=13, markeredgewidth=2.5, zorder=3)
        reached = own.loc[own["outcome"] == "reached", "cost"].astype(float).tolist()
        heights = [place + move for move in stacked(reached, 0.02 * _right_edge(frame))]
        dots = ax.plot(reached, heights, linestyle="", marker="o", markersize=5.5, color=colour)[0]
        dots.set(markeredgecolor=look.theme.background, zorder=4)
        _plot_misses(ax, int((own["outcome"] == "missed").sum()), place, colour)
    ax.set_xlim(0, _right_edge(frame))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 4, 5, 10)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    ax.set_yticks(range(len(cells)), [shorten(cell, _label_width(look)) if has_labels else "" for cell in cells])
    for label, cell in zip(ax.get_yticklabels(), cells, strict=True):
        label.set(color=look.colour(cell), parse_math=False)
    ax.set_ylim(-0.6, len(cells) - 0.4)
    ax.grid(False)
    ax.grid(True, axis="x")
    return ax


def _right_edge(frame: pd.DataFrame) -> float:
    """Room for what runs have spent and for an arrow behind it; a wide interval may reach beyond the panel."""
    return 1.16 * float(frame["spent"].astype(float).max() or 1)


def _plot_misses(ax: Axes, num: int, place: int, colour: str) -> None:
    """An arrow at the right edge, and how many runs it stands for."""
    if num:
        where = ax.get_yaxis_transform()
        ax.plot([0.982], [place], marker=">", markersize=6.5, color=colour, transform=where, zorder=4, clip_on=False)
        ax.text(0.955, place, f"{num}", ha="right", va="center_baseline", fontsize=8, color=colour, transform=where)


def _label_width(look: Look) -> float:
    """Width for the longest name, in inches."""
    return 1.2 if look.is_narrow else 2.2


def costs_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """A panel for every clock, two beside each other where there is room; names stand at the left ones."""
    units = [UNITS[name] for name in dict.fromkeys(frame["unit"])]
    num_cells, columns = frame["cell"].nunique(), 1 if look.is_narrow else min(2, len(units))
    num_rows = math.ceil(len(units) / columns)
    with matplotlib.rc_context(rc(look.theme)):
        left = 0.15 + text_width(shorten(cell, _label_width(look)) for cell in frame["cell"].unique())
        width, gap, bottom, row_gap = 4.2 if look.is_narrow else 8.4, 0.28, 0.3, 0.72
        panel_height, panel_width = 0.3 + 0.3 * num_cells, (width - left - 0.14 - gap * (columns - 1)) / columns
        height = num_rows * panel_height + (num_rows - 1) * row_gap + bottom + 0.4
        figure = Figure(figsize=(width, height))
        for i, unit in enumerate(units):
            row, column = divmod(i, columns)
            x = left + column * (panel_width + gap)
            y = height - 0.4 - panel_height - row * (panel_height + row_gap)
            ax = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
            plot_costs(ax, frame[frame["unit"] == unit.name], look, has_labels=column == 0)
            ax.set_title(f"{unit.words[0].upper()}{unit.words[1:]}", color=look.theme.text, fontsize=9)
    return figure
