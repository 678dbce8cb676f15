"""Figures of an ablation: a curve over the levels of every axis, and a heatmap for every pair of a grid's axes.

Like all figures they are drawn from the frame that is saved beside them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

from harness.records.ablation import Axis, Subject
from harness.records.metrics import metric
from reports.ablation.tables import Level, has_product, levels
from reports.ablation.trials import Ablation, level_text
from reports.figures.labels import shorten, text_width
from reports.figures.lines import LOG_RANGE
from reports.figures.style import Look, rc
from reports.statistics.intervals import t_interval
from reports.tables.results import shared_digits_of

ROOM = 0.6
"""Part of the range of the values by which an axis goes beyond them; intervals are cut off there."""

COLOURS = "cividis"
"""Colours of heatmaps, made for colour-blind readers. Its bright end is the better one."""


# -- curves over levels ---------------------------------------------------------------------------------------------


def level_frame(ablation: Ablation, subject: Subject) -> pd.DataFrame:
    """What the curves are drawn from: for every axis its levels' seeds and means, and the control's.

    `series` is seed, mean (with its 95% interval) or control; `place` is where a level stands on its axis, the level
    itself where levels are numbers.
    """
    lines: list[dict[str, Any]] = []
    control = ablation.result(ablation.control, subject.default_cell)
    for axis in subject.axes:
        for place, level in enumerate(levels(ablation, subject, axis)):
            lines += _level_lines(axis, level, float(level.value) if axis.is_numeric else place)
        if control.finite:
            lines.append(
                {"axis": axis.name, "series": "control", "value": control.mean, "num_seeds": len(control.finite)}
            )
    columns = ["quantity", "cell", "axis", "series", "level", "place", "is_numeric", "is_default", "seed"]
    frame = pd.DataFrame(lines, columns=[*columns, "value", "low", "high", "num_seeds"])
    frame["quantity"] = ablation.objective
    frame["cell"] = [ablation.control if series == "control" else subject.default_cell for series in frame["series"]]
    return frame.astype({"seed": "Int64", "num_seeds": "Int64"})


def _level_lines(axis: Axis, level: Level, place: float) -> list[dict[str, Any]]:
    """A row per seed, and one for the mean: all of a level that has no value yet."""
    about = {
        "axis": axis.name,
        "level": level_text(level.value),
        "place": place,
        "is_numeric": axis.is_numeric,
        "is_default": level.is_default,
    }
    values = level.result.finite
    interval = t_interval(list(values.values()))
    mean = {
        "series": "mean",
        "value": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "num_seeds": interval.num,
    }
    seeds = [{"series": "seed", "seed": seed, "value": value} for seed, value in values.items()]
    return [{**about, **line} for line in (*seeds, mean)]


def levels_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """Small multiples on one scale, a panel for every axis."""
    names = list(dict.fromkeys(frame["axis"]))
    low, high = _limits(frame)
    with matplotlib.rc_context(rc(look.theme)):
        figure, axes = _panels(len(names), look)
        for ax, name in zip(axes, names, strict=True):
            plot_levels(ax, frame[frame["axis"] == name], look)
            ax.set_ylim(low, high)
            ax.set_title(shorten(name, ax.bbox.width / ax.figure.dpi), color=look.theme.text, parse_math=False)
        _caption_line(figure, frame, look)
    return figure


def _panels(num: int, look: Look) -> tuple[Figure, list[Axes]]:
    """A figure with panels below a line of text."""
    num_columns = 1 if look.is_narrow else min(2 if num in (2, 4) else 3, num)
    num_rows = math.ceil(num / num_columns)
    width, height, top = 4.2 if look.is_narrow else 8.4, 2.5 if num_columns < 3 else 2.0, 0.62
    left, gap, row_gap, bottom = 0.56, 0.62, 0.72, 0.34
    panel = (width - left - 0.14 - gap * (num_columns - 1)) / num_columns
    total = top + num_rows * height + (num_rows - 1) * row_gap + bottom
    figure = Figure(figsize=(width, total))
    axes = []
    for row, column in (divmod(i, num_columns) for i in range(num)):
        x, y = left + column * (panel + gap), total - top - height - row * (height + row_gap)
        axes.append(figure.add_axes((x / width, y / total, panel / width, height / total)))
    return figure, axes


def _limits(frame: pd.DataFrame) -> tuple[float, float]:
    """Room for all values, and for intervals as far as they do not make the values themselves small."""
    values = frame["value"].dropna()
    low, high = float(values.min()), float(values.max())
    room = ROOM * (high - low) or 0.05 * abs(high) or 1.0
    ends = frame[["low", "high"]].stack()
    lowest, highest = min([low, *ends]), max([high, *ends])
    pad = 0.05 * (high - low) or 0.5 * room
    return max(lowest - pad, low - room), min(highest + pad, high + room)


def is_cut(frame: pd.DataFrame) -> bool:
    """Whether an interval reaches beyond the axis."""
    low, high = _limits(frame)
    return bool((frame["low"] < low).any() or (frame["high"] > high).any())


def plot_levels(ax: Axes, frame: pd.DataFrame, look: Look) -> Axes:
    """One axis: seeds as thin lines, means with their intervals, the default as a ring, the control as a line."""
    for value in frame.loc[frame["series"] == "control", "value"]:
        ax.axhline(value, color=look.theme.baseline, linewidth=1.4, dashes=(5, 2), zorder=1)
    own = frame[frame["series"] != "control"].sort_values("place", kind="stable")
    colour = look.theme.cells[0]
    is_numeric = bool(own["is_numeric"].iloc[0])
    for _, seed in own[own["series"] == "seed"].groupby("seed", sort=True):
        style = "-" if is_numeric else ""
        ax.plot(
            seed["place"],
            seed["value"],
            linestyle=style,
            color=colour,
            linewidth=0.8,
            alpha=0.5,
            marker="o",
            markersize=3,
        )
    means = own[own["series"] == "mean"]
    ax.plot(means["place"], means["value"], linestyle="-" if is_numeric else "", color=colour, linewidth=2, zorder=3)
    for place, low, high in zip(means["place"], means["low"], means["high"], strict=True):
        if math.isfinite(low):
            ax.plot(
                [place, place], [low, high], color=colour, linewidth=2.2, alpha=0.35, zorder=2, solid_capstyle="butt"
            )
    for place, value, is_default in zip(means["place"], means["value"], means["is_default"], strict=True):
        face = look.theme.background if is_default else colour
        ax.plot(
            [place], [value], marker="o", markersize=7, color=colour, markerfacecolor=face, markeredgewidth=2, zorder=4
        )
    _level_axis(ax, means, is_numeric)
    return ax


def _level_axis(ax: Axes, means: pd.DataFrame, is_numeric: bool) -> None:
    """A tick at every level, its name at the tick; logarithmic where numbers span a decade."""
    places = means["place"].tolist()
    if is_numeric and min(places) > 0 and max(places) >= LOG_RANGE * min(places):
        ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(places))
    ax.xaxis.set_minor_locator(NullLocator())
    room = ax.bbox.width / ax.figure.dpi / len(places)
    is_tight = max(text_width([text]) for text in means["level"]) > room
    ax.set_xticks(places, [shorten(text, room * (1.5 if is_tight else 1)) for text in means["level"]])
    for label in ax.get_xticklabels():
        label.set(parse_math=False, fontsize=6.5 if is_tight else 8.5)
    if not is_numeric or len(places) == 1:
        ax.set_xlim(min(places) - 0.5, max(places) + 0.5)


def _caption_line(figure: Figure, frame: pd.DataFrame, look: Look) -> None:
    """What the marks are, above the panels."""
    width = figure.get_figwidth()
    name, theme = frame["quantity"].iloc[0], look.theme
    controls = frame.loc[frame["series"] == "control", "cell"].tolist()
    y = 1 - 0.16 / figure.get_figheight()
    better = f"{metric(name).direction} is better"
    text = better if look.is_narrow else f"{shorten(name, 3)}, {better}"
    figure.text(1 - 0.14 / width, y, text, ha="right", va="center", color=theme.muted, fontsize=8, parse_math=False)
    x = 0.14
    keys = [("○ default", theme.cells[0])]
    if controls:
        keys.append((f"- - {shorten(controls[0], 1.5)}", theme.baseline))
    for key, colour in keys:
        figure.text(x / width, y, key, va="center", color=colour, parse_math=False)
        x += text_width([key]) + 0.25


# -- heatmaps -------------------------------------------------------------------------------------------------------


def pairs(ablation: Ablation, subject: Subject) -> list[tuple[Axis, Axis]]:
    """Pairs of axes of which the grid has settings that are off the default on both, and on no other."""
    found = []
    for first, second in itertools.combinations(subject.axes, 2) if has_product(ablation, subject) else ():
        frame = pair_frame(ablation, subject, first, second)
        both = (frame["level_y"] != level_text(first.default)) & (frame["level_x"] != level_text(second.default))
        if (frame["is_asked"] & both).any():
            found.append((first, second))
    return found


def pair_frame(ablation: Ablation, subject: Subject, first: Axis, second: Axis) -> pd.DataFrame:
    """Means over a pair of axes, the others at their default: a row per field; the axis with more levels is x."""
    x, y = (first, second) if len(first.all_levels) >= len(second.all_levels) else (second, first)
    lines = []
    for level_y, level_x in itertools.product(y.all_levels, x.all_levels):
        setting = {**subject.default, x.name: level_x, y.name: level_y}
        trial = ablation.find(subject, setting)
        result = ablation.result(trial.cell if trial else "", subject.default_cell)
        lines.append(
            {
                "quantity": ablation.objective,
                "axis_x": x.name,
                "axis_y": y.name,
                "level_x": level_text(level_x),
                "level_y": level_text(level_y),
                "is_asked": trial is not None,
                "is_default": setting == subject.default,
                "value": result.mean,
                "num_seeds": len(result.finite),
                "of_seeds": len(ablation.seeds),
            }
        )
    return pd.DataFrame(lines)


def heatmap_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """One pair of axes, every value in its field."""
    columns, rows = frame["level_x"].nunique(), frame["level_y"].nunique()
    with matplotlib.rc_context(rc(look.theme)):
        width = 4.2 if look.is_narrow else 8.4
        left = 0.5 + min(text_width(frame["level_y"]), 1.4)
        field = min((width - left - 0.9) / columns, 1.1)
        height = 0.62 + 0.62 * rows + 0.55
        figure = Figure(figsize=(width, height))
        size = (field * columns / width, 0.62 * rows / height)
        ax = figure.add_axes((left / width, 0.55 / height, *size))
        bar = figure.add_axes(((left + field * columns + 0.16) / width, 0.55 / height, 0.12 / width, size[1]))
        plot_heatmap(ax, bar, frame, look)
    return figure


def plot_heatmap(ax: Axes, bar: Axes, frame: pd.DataFrame, look: Look) -> Axes:
    """Fields coloured by their mean, the better the brighter; the default's is framed, and what is not there empty."""
    name = frame["quantity"].iloc[0]
    levels_x, levels_y = list(dict.fromkeys(frame["level_x"])), list(dict.fromkeys(frame["level_y"]))
    values = frame["value"].to_numpy(dtype=float).reshape(len(levels_y), len(levels_x))
    is_lower = metric(name).direction == "lower"
    colours = matplotlib.colormaps[f"{COLOURS}_r" if is_lower else COLOURS]
    finite = frame["value"].dropna()
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    room = 0.0 if high > low else 0.5
    image = ax.imshow(values, cmap=colours, vmin=low - room, vmax=high + room, aspect="auto")
    ax.grid(False)
    show = shared_digits_of(finite)
    for i, (value, line) in enumerate(zip(frame["value"].astype(float), frame.itertuples(), strict=True)):
        _annotate(ax, *divmod(i, len(levels_x)), show(value), line, _ink(image, value, look))
    _name_axis(ax, "x", levels_x, frame["axis_x"].iloc[0])
    _name_axis(ax, "y", levels_y, frame["axis_y"].iloc[0])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    _title(ax, name, look)
    _bar(bar, image, is_lower)
    return ax


def _annotate(ax: Axes, row: int, column: int, value: str, line: Any, ink: str) -> None:
    size = 9 if ax.bbox.width / ax.figure.dpi / (ax.get_xlim()[1] - ax.get_xlim()[0]) > 0.6 else 7
    ax.text(column, row, value if line.is_asked else "", ha="center", va="center", color=ink, fontsize=size)
    if 0 < line.num_seeds < line.of_seeds:
        text = f"{line.num_seeds} of {line.of_seeds} seeds"
        ax.text(column, row + 0.33, text, ha="center", va="center", color=ink, fontsize=0.7 * size)
    if line.is_default:
        ax.add_patch(
            Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=ink, linewidth=1.6, linestyle="--")
        )


def _ink(image: Any, value: float, look: Look) -> str:
    """Black or white, whichever stands out from the field's colour; the theme's text where there is none."""
    if not math.isfinite(value):
        return look.theme.text
    red, green, blue, _ = image.cmap(image.norm(value))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


def _name_axis(ax: Axes, which: str, names: Sequence[str], title: str) -> None:
    """A name at every column or row."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    room = ax.bbox.width / ax.figure.dpi / len(names) if which == "x" else 1.4
    axis.set_ticks(range(len(names)), [shorten(name, room) for name in names])
    for label in (*axis.get_ticklabels(), axis.label):
        label.set_parse_math(False)
    axis.set_label_text(title)


def _title(ax: Axes, name: str, look: Look) -> None:
    text = metric(name).title if look.is_narrow else f"{metric(name).title}, {shorten(name, 4)}"
    ax.set_title(text, color=look.theme.text, parse_math=False)


def _bar(bar: Axes, image: Any, is_lower: bool) -> None:
    """The colours' scale, its better end named and on top."""
    bar.figure.colorbar(image, cax=bar)
    if is_lower:
        bar.invert_yaxis()
    bar.grid(False)
    bar.tick_params(labelsize=7.5, length=2)
    bar.set_title("better", fontsize=7.5, fontweight="normal", loc="left", pad=4)
