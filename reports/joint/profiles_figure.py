"""The figure of performance profiles: a panel for every clock, a step line for every cell."""

import math

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from reports.figures.labels import label_width, shorten, text_width
from reports.figures.style import Look, rc
from reports.study.units import UNITS

LINE = 0.22
"""Height of a line of the key, in inches."""


LOG_FROM = 4
"""Ratios that go beyond this have a logarithmic axis."""


def plot_profiles(ax: Axes, frame: pd.DataFrame, look: Look) -> Axes:
    """One clock: shares as steps over ratios, on to the right edge, with a mark where each line rises."""
    edge = 1.06 * max(float(frame["ratio"].max()), 1.2)
    for cell, style in look.styles.items():
        own = frame[frame["cell"] == cell]
        own = own[own["share"].diff().fillna(1) > 0]
        ratios, shares = [*own["ratio"], edge], [*own["share"], own["share"].iloc[-1]]
        line = ax.step(ratios, shares, where="post", color=style.colour(look.theme), linewidth=1.8)[0]
        line.set(marker=style.marker, markersize=4, markevery=slice(0, len(own)), clip_on=False)
        if style.dashes:
            line.set_dashes(style.dashes)
    if edge > LOG_FROM:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 2.5, 5, 10)))
    ax.set_xlim(1, edge)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return ax


def profiles_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """All clocks below one key."""
    units = [UNITS[name] for name in dict.fromkeys(frame["unit"])]
    columns, width = (1, 4.2) if look.is_narrow else (len(units), 8.4)
    names = [shorten(cell, label_width(look)) for cell in look.styles]
    key_columns = max(1, min(len(names), int(width / (0.6 + text_width(names)))))
    with matplotlib.rc_context(rc(look.theme)):
        left, gap, row_gap, panel_height, top = 0.5, 0.5, 0.9, 2.1, 0.5 + LINE * math.ceil(len(names) / key_columns)
        rows, panel_width = math.ceil(len(units) / columns), (width - left - 0.2 - gap * (columns - 1)) / columns
        height = top + rows * panel_height + (rows - 1) * row_gap + 0.5
        figure = Figure(figsize=(width, height))
        for i, unit in enumerate(units):
            row, column = divmod(i, columns)
            x, y = left + column * (panel_width + gap), height - top - panel_height - row * (panel_height + row_gap)
            ax = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
            plot_profiles(ax, frame[frame["unit"] == unit.name], look)
            words = "steps or images" if unit.name == "steps" else unit.words
            ax.set_title(f"{words[0].upper()}{words[1:]}", color=look.theme.text, fontsize=9)
            ax.set_xlabel("of the cheapest cell's cost")
        _key(figure, look, names, key_columns)
    return figure


def _key(figure: Figure, look: Look, names: list[str], num_columns: int) -> None:
    """Names go in afterwards: a legend drops labels that begin with `_`."""
    handles = [
        Line2D([], [], color=look.colour(cell), linewidth=2, marker=style.marker, markersize=4.5)
        for cell, style in look.styles.items()
    ]
    numbers = [str(i) for i in range(len(handles))]
    legend = figure.legend(handles, numbers, loc="upper left", ncols=num_columns, borderaxespad=0.2, handlelength=1.6)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False, color=look.theme.text)
