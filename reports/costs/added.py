"""What cells cost more than the baseline: counted GFLOPs of an image, and beside them measured seconds of a step."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports.costs.equal_cost import seconds_remarks, unequal_timing
from reports.figures.labels import label_width, shorten, text_width
from reports.figures.plans import Plan
from reports.figures.style import Look, rc
from reports.statistics.intervals import t_interval
from reports.study.load import Study
from reports.study.units import UNITS
from reports.tables.results import MINUS

COLUMNS = ["quantity", "series", "cell", "seed", "value", "low", "high"]
"""Columns of the frame. Values are percent over the baseline's; `mean` is over the seeds, with its 95% interval."""

COUNTED, MEASURED = "training GFLOPs an image", "seconds a step"

PALE, FULL = 0.32, 0.85
"""Opacity of counted and of measured bars."""


def added_frame(study: Study) -> pd.DataFrame:
    """What the figure is drawn from; empty without a baseline whose cost was counted or whose time counts.

    Times are paired by seed. Runs that shared their device have none, and no run has where devices or threads differ.
    """
    control = study.cost(study.baseline).get("train_gflops_per_image") if study.baseline else None
    seconds = {} if unequal_timing(study) else step_seconds(study)
    own: Mapping[int, float] = seconds.get(study.baseline, {})
    rows: list[dict[str, Any]] = []
    for cell in study.cells:
        total = study.cost(cell).get("train_gflops_per_image")
        if cell == study.baseline:
            continue
        if total and control:
            rows.append({"quantity": COUNTED, "series": "counted", "cell": cell, "value": _percent(total, control)})
        paired = {seed: _percent(time, own[seed]) for seed, time in seconds.get(cell, {}).items() if seed in own}
        start = {"quantity": MEASURED, "cell": cell}
        rows += [{**start, "series": "seed", "seed": seed, "value": value} for seed, value in paired.items()]
        if paired:
            interval = t_interval(list(paired.values()))
            mean = {"value": interval.mean, "low": interval.low, "high": interval.high}
            rows.append({**start, "series": "mean", **mean})
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64"})


def step_seconds(study: Study) -> dict[str, dict[int, float]]:
    """Training seconds of a step by cell and seed, up to the compared point, of the runs whose seconds count."""
    found: dict[str, dict[int, float]] = {}
    for run in study.counted(UNITS["seconds"]):
        if line := run.evaluation(study.point):
            found.setdefault(run.cell, {})[run.seed] = line["train_seconds"] / line["step"]
    return found


def _percent(value: float, control: float) -> float:
    return 100 * (value / control - 1)


# -- the figure -------------------------------------------------------------------------------------------------------


def plot_added(ax: Axes, frame: pd.DataFrame, look: Look) -> Axes:
    """Per cell a pale bar for what is counted and a full one below it for what is measured, with seeds and interval."""
    cells = list(dict.fromkeys(frame["cell"]))[::-1]
    is_measured = (frame["series"] == "mean").any()
    for place, cell in enumerate(cells):
        own = frame[frame["cell"] == cell]
        counted, means, seeds = (own[own["series"] == series] for series in ("counted", "mean", "seed"))
        for value in counted["value"]:
            _bar(ax, value, place + (0.2 if is_measured else 0), look.colour(cell), PALE)
        for mean in means.itertuples():
            _bar(ax, mean.value, place - 0.2, look.colour(cell), FULL)
            if math.isfinite(mean.low):
                ax.plot([mean.low, mean.high], [place - 0.2] * 2, color=look.theme.text, linewidth=1.2, zorder=3)
        dots = ax.plot(seeds["value"], [place - 0.2] * len(seeds), linestyle="", marker="o", markersize=4)[0]
        dots.set(color=look.theme.text, markeredgecolor=look.theme.background, markeredgewidth=0.6, zorder=4)
    _limits(ax, frame)
    ax.axvline(0, color=look.theme.text, linewidth=1, zorder=2)
    ax.set_yticks(range(len(cells)))
    labels = ax.set_yticklabels([shorten(cell, label_width(look)) for cell in cells])
    for label, cell in zip(labels, cells, strict=True):
        label.set(color=look.colour(cell), parse_math=False)
    return ax


def _bar(ax: Axes, value: float, place: float, colour: str, alpha: float) -> None:
    ax.barh([place], [value], height=0.36, color=colour, alpha=alpha, zorder=1)


def _limits(ax: Axes, frame: pd.DataFrame) -> None:
    """Room for bars and seeds; a wide interval may reach beyond the axes."""
    low, high = min(0.0, float(frame["value"].min())), max(0.0, float(frame["value"].max()))
    margin = 0.08 * (high - low) or 1.0
    ax.set_xlim(low - margin if low < 0 else 0, high + margin)
    ax.set_ylim(-0.6, frame["cell"].nunique() - 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 4, 5, 10)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}%".replace("-", MINUS) if value else "0"))
    ax.grid(False)
    ax.grid(True, axis="x")


def added_figure(frame: pd.DataFrame, look: Look, baseline: str) -> Figure:
    """The bars of all cells, with a key of what they are."""
    cells = frame["cell"].unique()
    with matplotlib.rc_context(rc(look.theme)):
        width, height = 4.2 if look.is_narrow else 8.4, 1.15 + 0.52 * len(cells)
        left = 0.15 + text_width(shorten(cell, label_width(look)) for cell in cells)
        figure = Figure(figsize=(width, height))
        ax = figure.add_axes((left / width, 0.3 / height, 1 - (left + 0.15) / width, 1 - 0.95 / height))
        plot_added(ax, frame, look)
        title = f"Cost over {shorten(baseline, 1.4)}"
        figure.text(0.1 / width, 1 - 0.2 / height, title, fontweight="bold", fontsize=10, va="center", parse_math=False)
        known = set(frame["quantity"])
        bars = {COUNTED: PALE, MEASURED: FULL}
        handles = [Patch(color=look.theme.muted, alpha=bars[name], label=name) for name in bars if name in known]
        place = (0, 1 - 0.42 / height)
        figure.legend(handles=handles, loc="center left", bbox_to_anchor=place, ncols=len(handles), handlelength=1)
    return figure


def added_plan(study: Study) -> Plan | None:
    """The figure with its words; None where nothing is known beside a baseline."""
    frame = added_frame(study)
    if frame.empty:
        return None
    caption = f"Percent over {study.baseline}. {COUNTED[0].upper()}{COUNTED[1:]}: counted."
    if (frame["series"] == "mean").any():
        caption += (
            f" {MEASURED[0].upper()}{MEASURED[1:]}: measured {study.after}, each seed beside the baseline's at that "
            "seed (dots), their mean (bar) and its 95% Student-t interval (line)."
        )
    caption += "".join(f" {remark}" for remark in seconds_remarks(study))
    draw = partial(added_figure, baseline=study.baseline)
    return Plan("added_cost", frame, draw, f"Cost of every cell over {study.baseline}", caption)
