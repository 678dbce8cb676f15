"""Figures of an ablation's trials: their history, their settings as parallel coordinates, the importance of its axes.

All are drawn from frames that are saved beside them. Optuna computes the importances, and is imported when they are
asked for, as comparisons do without it.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.records.ablation import Axis
from reports.ablation.trials import Ablation, Subject, level_text
from reports.figures.labels import End, label_ends, label_width, shorten, text_width
from reports.figures.lines import LOG_RANGE, metric_title, scale_values
from reports.figures.style import Look, Theme, rc

if TYPE_CHECKING:
    import optuna

LEAST_TRIALS = 30
"""Finished trials from which importances are shown: those of fewer are noise."""

SEED = 0
"""Seed of the random forest behind the importances."""

LEVEL_GAP = 0.1
"""Least distance of two levels that are named on one axis, as a share of its height."""


# -- frames ---------------------------------------------------------------------------------------------------------


def trial_frame(ablation: Ablation, subject: Subject) -> pd.DataFrame:
    """Every trial of a method: its number, how it stands, its mean over the seeds and its setting."""
    rows = []
    for trial in ablation.of(subject):
        mean = ablation.result(trial.cell, subject.default_cell).mean
        is_complete = trial.state == "complete" and math.isfinite(mean)
        about = {"quantity": ablation.objective, "direction": ablation.direction, "method": subject.method}
        value = mean if is_complete else math.nan
        rows.append({**about, "trial": trial.number, "state": trial.state, "value": value, **_plain(trial.setting)})
    return pd.DataFrame(rows)


def _plain(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A setting whose values Optuna takes: numbers, words, true and false."""
    return {
        column(name): value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in setting.items()
    }


def column(axis: str) -> str:
    """The column of an axis, whose name may be that of another column."""
    return f"setting.{axis}"


def importance_frame(frame: pd.DataFrame, axes: tuple[Axis, ...]) -> pd.DataFrame:
    """The importance of every axis, by functional ANOVA with a fixed seed; empty where all values are the same."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    columns = ["quantity", "direction", "method", "axis", "importance", "num_trials"]
    done = frame.dropna(subset=["value"])
    if done["value"].nunique() < 2:
        return pd.DataFrame(columns=columns)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study()  # minimises: importances ask for no direction
    finally:
        optuna.logging.set_verbosity(level)
    ranges = {axis.name: _distribution(axis, frame[column(axis.name)].tolist()) for axis in axes}
    for line in done.to_dict("records"):
        params = {name: line[column(name)] for name in ranges}
        study.add_trial(optuna.trial.create_trial(value=line["value"], params=params, distributions=ranges))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=SEED))
    about = frame.iloc[0][columns[:3]].to_dict()
    return pd.DataFrame([{**about, "axis": k, "importance": v, "num_trials": len(done)} for k, v in found.items()])


def _distribution(axis: Axis, values: list[Any]) -> "optuna.distributions.BaseDistribution":
    """The range of an axis's numbers, or all of its values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "int":
        return IntDistribution(min(values), max(values))
    if axis.kind == "float":
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(list(dict.fromkeys(values)))


# -- figures --------------------------------------------------------------------------------------------------------


def history_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """Every trial's value by its number, and the best so far, for every method of the frame."""
    studies = list(frame.groupby("method", sort=False))
    names = [shorten(str(method), label_width(look)) if len(studies) > 1 else "" for method, _ in studies]
    with matplotlib.rc_context(rc(look.theme)):
        figure, (ax,) = _canvas(look, 2.9, left=0.6, right=0.2 + text_width(names))
        scale_values(ax, frame)
        ends = []
        for i, (_, own) in enumerate(studies):
            colour = look.theme.cells[i % len(look.theme.cells)]
            done = own.dropna(subset=["value"])
            best = own["value"].cummin() if own["direction"].iloc[0] == "lower" else own["value"].cummax()
            ax.scatter(done["trial"], done["value"], s=28, color=colour, edgecolor=look.theme.background, zorder=3)
            ax.plot(own["trial"], best.ffill(), color=colour, linewidth=1.6, drawstyle="steps-post")
            ends.append(End(float(best.ffill().iloc[-1]), names[i], colour))
        ax.set_xlabel("trial")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        metric_title(ax, frame["quantity"].iloc[0], look)
        if len(ends) > 1:
            label_ends(ax, ends)
    return figure


def parallel_figure(frame: pd.DataFrame, look: Look, axes: tuple[Axis, ...]) -> Figure:
    """Parallel coordinates: a line per trial with a value, through its setting; the better stands out more.

    Many axes take several panels, each of which begins at the value.
    """
    done = frame.dropna(subset=["value"])
    most = 4 if look.is_narrow else 8
    panels = [axes[i : i + most] for i in range(0, len(axes), most)]
    with matplotlib.rc_context(rc(look.theme)):
        figure, drawn = _canvas(look, 3.4, left=0.6, right=0.85, num=len(panels))
        for ax, own in zip(drawn, panels, strict=True):
            _plot_parallel(ax, done, own, look)
        _title(drawn[0], f"Settings by {frame['quantity'].iloc[0]}")
    return figure


def _plot_parallel(ax: Axes, done: pd.DataFrame, axes: tuple[Axis, ...], look: Look) -> None:
    low, high = done["value"].min(), done["value"].max()
    span = high - low or 1.0
    ax.set(ylim=(low - 0.06 * span, high + 0.06 * span), xlim=(0, len(axes)))
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    places = [low + _heights(axis, done[column(axis.name)].tolist()) * span for axis in axes]
    points = [np.stack([np.full(len(done), i), at], axis=1) for i, at in enumerate([done["value"], *places])]
    ranks = done["value"].rank(ascending=done["direction"].iloc[0] == "higher", pct=True).to_numpy()
    order = np.argsort(ranks, kind="stable")  # the best is drawn last, and so on top
    lines = list(np.stack(points, axis=1)[order])
    ax.add_collection(LineCollection(lines, colors=_shades(look.theme, ranks[order]), linewidths=1.4))
    for i, (axis, at) in enumerate(zip(axes, places, strict=True), start=1):
        ax.axvline(i, color=look.theme.muted, linewidth=0.8, zorder=1)
        _name_levels(ax, i, dict(zip(at.tolist(), done[column(axis.name)], strict=True)), look)
    _name_axes(ax, ["value", *(axis.name for axis in axes)])


def _heights(axis: Axis, values: Sequence[Any]) -> np.ndarray:
    """Where values stand on their axis, from 0 to 1: numbers to scale, other levels evenly in order of appearance."""
    if axis.is_numeric:
        numbers = np.array(values, dtype=float)
        is_long = numbers.min() > 0 and numbers.max() >= LOG_RANGE * numbers.min()
        numbers = np.log(numbers) if is_long else numbers
    else:
        levels = list(dict.fromkeys(values))
        numbers = np.array([levels.index(value) for value in values], dtype=float)
    span = numbers.max() - numbers.min()
    return (numbers - numbers.min()) / span if span else np.full(len(numbers), 0.5)


def _name_levels(ax: Axes, place: int, levels: Mapping[float, Any], look: Look) -> None:
    """Name the levels of an axis beside it: both ends, and of the others as many as are clear of each other."""
    bottom, top = ax.get_ylim()
    gap = LEVEL_GAP * (top - bottom)
    heights = sorted(levels)
    shown = heights[-1:]
    for height in heights[:1] + heights[1:-1]:
        if all(abs(height - other) >= gap for other in shown):
            shown.append(height)
    room = min(ax.bbox.width / ax.figure.dpi / ax.get_xlim()[1] - 0.15, 0.72)
    ground = {"facecolor": look.theme.background, "edgecolor": "none", "pad": 1, "alpha": 0.8}
    for height in shown:
        level = levels[height]
        text = level_text(level)
        if isinstance(level, float) and text_width([text]) > room:
            text = f"{level:.2g}"
        label = ax.annotate(
            shorten(text, room), (place, height), (5, 0), textcoords="offset points", va="center", zorder=4
        )
        label.set(color=look.theme.muted, fontsize=8, bbox=ground, parse_math=False)


def _name_axes(ax: Axes, names: Sequence[str]) -> None:
    """Names below their axes; every other one is a line lower where they would meet."""
    room = ax.bbox.width / ax.figure.dpi / (len(names) - 1)
    is_tight = text_width(names) > room - 0.1
    texts = [shorten(name, (2 if is_tight else 1) * room - 0.1) for name in names]
    ax.set_xticks(range(len(names)), ["\n" + text if is_tight and i % 2 else text for i, text in enumerate(texts)])
    for label in ax.get_xticklabels():
        label.set_parse_math(False)


def _shades(theme: Theme, ranks: np.ndarray) -> np.ndarray:
    """Blues for ranks of 0 to 1: the better stand out more from the page, and none vanishes in it."""
    low, high = (0.3, 1.0) if theme.name == "light" else (0.85, 0.1)
    return np.asarray(matplotlib.colormaps["Blues"](low + (high - low) * ranks))


def importance_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """A bar for every axis of a frame of importances, the largest at the top, with its share at its end."""
    names = [shorten(name, 1.3) for name in frame["axis"]]
    shares = frame["importance"].to_numpy(float)
    with matplotlib.rc_context(rc(look.theme)):
        figure, (ax,) = _canvas(look, 1.1 + 0.34 * len(frame), left=0.25 + text_width(names), right=0.15)
        bars = ax.barh(range(len(frame)), shares, height=0.62, color=look.theme.cells[0])
        ax.bar_label(bars, [f"{share:.2f}" if share >= 0.01 else "<0.01" for share in shares], padding=4, fontsize=8.5)
        ax.set_yticks(range(len(frame)), names)
        for label in ax.get_yticklabels():
            label.set_parse_math(False)
        ax.set(ylim=(len(frame) - 0.5, -0.5), xlim=(0, 1.15 * max(shares.max(), 0.01)))
        ax.set_xlabel("share of the variance between settings")
        ax.grid(False)
        _title(ax, f"Importance for {frame['quantity'].iloc[0]}")
    return figure


def _canvas(look: Look, height: float, left: float, right: float, num: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with `num` pairs of axes below each other; lengths in inches, the height of each."""
    width, whole = 4.2 if look.is_narrow else 8.4, num * height
    figure = Figure(figsize=(width, whole))
    size = (1 - (left + right) / width, (height - 0.96) / whole)
    return figure, [figure.add_axes((left / width, (i * height + 0.56) / whole, *size)) for i in reversed(range(num))]


def _title(ax: Axes, title: str) -> None:
    room = ax.bbox.width / ax.figure.dpi / 1.3  # titles are larger and bold
    ax.set_title(shorten(title, room), color=matplotlib.rcParams["text.color"], parse_math=False)
