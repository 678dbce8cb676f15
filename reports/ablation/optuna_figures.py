"""Optuna's own figures of an ablation: history, parallel coordinates and importances.

Optuna draws them on a study in memory that is rebuilt from the frame saved beside the figure; here they get the
page's colours and type. Optuna and pyplot are imported when they are asked for, as comparisons do without.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.records.ablation import Axis, Subject
from reports.ablation.trials import Ablation, level_text
from reports.figures.labels import shorten, text_width
from reports.figures.style import Look, Theme, rc

if TYPE_CHECKING:
    import optuna

LEAST_TRIALS = 30
"""Finished trials from which importances are shown: those of fewer are noise."""

SEED = 0
"""Of the random forest behind the importances."""


# -- the study, rebuilt ---------------------------------------------------------------------------------------------


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


def rebuilt(frame: pd.DataFrame, axes: tuple[Axis, ...]) -> "optuna.Study":
    """A study in memory with the trials of a method and these axes; trials without a value were pruned, or wait."""
    import optuna
    from optuna.study import StudyDirection
    from optuna.trial import TrialState, create_trial

    directions = {"lower": StudyDirection.MINIMIZE, "higher": StudyDirection.MAXIMIZE}
    with _quiet():
        study = optuna.create_study(
            study_name=frame["method"].iloc[0], direction=directions[frame["direction"].iloc[0]]
        )
    distributions = {axis.name: _distribution(axis, frame[column(axis.name)].tolist()) for axis in axes}
    states = {"pruned": TrialState.PRUNED, "diverged": TrialState.PRUNED}
    for line in frame.to_dict("records"):
        has_value = math.isfinite(line["value"])
        state = TrialState.COMPLETE if has_value else states.get(line["state"], TrialState.WAITING)
        study.add_trial(
            create_trial(
                state=state,
                value=line["value"] if has_value else None,
                params={axis.name: line[column(axis.name)] for axis in axes},
                distributions=distributions,
            )
        )
    return study


def _distribution(axis: Axis, values: list[Any]) -> "optuna.distributions.BaseDistribution":
    """The range of an axis's numbers, or all of its values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "int":
        return IntDistribution(min(values), max(values))
    if axis.kind == "float":
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(list(dict.fromkeys(values)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's messages, and without its warning that its figures are experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Of an axis at which all trials have one level, which matplotlib then gives room.
            warnings.filterwarnings("ignore", "Attempting to set identical low and high", UserWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


# -- importances ----------------------------------------------------------------------------------------------------


def importance_frame(frame: pd.DataFrame, axes: tuple[Axis, ...]) -> pd.DataFrame:
    """The importance of every axis, by functional ANOVA with a fixed seed; empty where all values are the same."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    columns = ["quantity", "direction", "method", "axis", "importance", "num_trials"]
    values = frame["value"].dropna()
    if values.nunique() < 2:
        return pd.DataFrame(columns=columns)
    with _quiet():
        found = get_param_importances(rebuilt(frame, axes), evaluator=FanovaImportanceEvaluator(seed=SEED))
    about = frame.iloc[0][columns[:3]].to_dict()
    return pd.DataFrame([{**about, "axis": k, "importance": v, "num_trials": len(values)} for k, v in found.items()])


def importance_figure(frame: pd.DataFrame, look: Look, trials: pd.DataFrame, axes: tuple[Axis, ...]) -> Figure:
    """Optuna's bars for a frame of importances."""
    from optuna.importance import BaseImportanceEvaluator
    from optuna.visualization.matplotlib import plot_param_importances

    class Known(BaseImportanceEvaluator):
        """Gives Optuna the importances of the frame, which were computed once for all variants of the figure."""

        def evaluate(self, study: Any, params: Any = None, *, target: Any = None) -> dict[str, float]:
            return dict(zip(frame["axis"], frame["importance"].astype(float), strict=True))

    with _pyplot(look.theme):
        ax = plot_param_importances(rebuilt(trials, axes), evaluator=Known())
        names = [shorten(name, 1.3) for name in frame["axis"]]
        height, left = 1.1 + 0.34 * len(frame), 0.25 + text_width(names)
        figure = _restyled(ax, look, f"Importance for {_objective(frame, look)}", height, left)
        for bar in ax.patches:
            bar.set_facecolor(look.theme.cells[0])
        for text in ax.texts:
            text.set(color=look.theme.text, fontsize=8.5)
        ax.set(xlabel="share of the variance between settings", ylabel="")
        ax.set_xlim(0, 1.15 * max(float(frame["importance"].max()), 0.01))
        _without_legend(ax)
    return figure


# -- history and parallel coordinates -------------------------------------------------------------------------------


def history_figure(frame: pd.DataFrame, look: Look) -> Figure:
    """Optuna's history: every trial's value by its number, and the best so far, for every method of the frame."""
    from optuna.visualization.matplotlib import plot_optimization_history

    with _pyplot(look.theme):
        studies = [rebuilt(own, ()) for _, own in frame.groupby("method", sort=False)]
        name = frame["quantity"].iloc[0]
        ax = plot_optimization_history(studies if len(studies) > 1 else studies[0], target_name=name)
        figure = _restyled(ax, look, "Values in the order of trials", 2.9)
        values = [points for points in ax.collections if points.get_label() in _labels(name, studies)]
        for i, (points, best) in enumerate(zip(values, ax.lines, strict=True)):
            colour = look.theme.cells[i % len(look.theme.cells)]
            points.set(facecolor=colour, edgecolor=look.theme.background, sizes=[28])
            best.set(color=colour, alpha=1, linewidth=1.6, drawstyle="steps-post")
        ax.set(xlabel="trial", ylabel=shorten(name, 2.4))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        _legend(ax, look, [study.study_name for study in studies])
    return figure


def _labels(name: str, studies: "list[optuna.Study]") -> list[str]:
    """What Optuna calls the values of each study."""
    return [name] if len(studies) == 1 else [f"{name} of {study.study_name}" for study in studies]


def _legend(ax: Axes, look: Look, names: list[str]) -> None:
    """The methods' names above the axes; with one there is nothing to tell apart."""
    _without_legend(ax)
    if len(names) > 1:
        handles = list(ax.lines)
        numbers = [str(i) for i in range(len(handles))]
        legend = ax.legend(handles, numbers, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), frameon=False)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set(text=shorten(name, 1.4), parse_math=False, color=look.theme.text)


def _without_legend(ax: Axes) -> None:
    if (legend := ax.get_legend()) is not None:
        legend.remove()


def parallel_figure(frame: pd.DataFrame, look: Look, axes: tuple[Axis, ...]) -> Figure:
    """Optuna's parallel coordinates: a line per trial with a value, through its setting; the better stands out more."""
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    with _pyplot(look.theme):
        study, name = rebuilt(frame, axes), frame["quantity"].iloc[0]
        ax = plot_parallel_coordinate(study, params=[axis.name for axis in axes], target_name=name)
        (lines,) = ax.collections
        assert lines.colorbar is not None
        lines.colorbar.remove()  # the first axis has the same scale
        figure = _restyled(ax, look, f"Settings by {_objective(frame, look)}", 3.2, right=0.75)
        lines.set(cmap=_towards_contrast(look.theme, frame["direction"].iloc[0]), linewidth=1.4, alpha=0.9)
        ax.grid(False)
        shown = [label.get_text() for label in ax.get_xticklabels()]  # Optuna puts axes in an order of its own
        room = (2.85 if look.is_narrow else 7.05) / len(axes)
        ax.set_xticks(range(len(shown)), [shorten(text, room) for text in ("value", *shown[1:])], rotation=0)
        for label in ax.get_xticklabels():
            label.set_parse_math(False)
        for own, axis in zip(figure.axes[1:], shown[1:], strict=True):
            _tick_levels(own, frame[column(axis)].tolist(), look.theme, min(room - 0.15, 0.65))
    return figure


def _tick_levels(ax: Axes, values: list[Any], theme: Theme, room: float) -> None:
    """Name an axis's levels beside it, in `room` inches, on a ground that keeps them readable between lines."""
    if not any(isinstance(value, (bool, str)) for value in values):
        levels = sorted(set(values))
        ax.set_yticks(levels, [level_text(level) for level in levels])
    for label in ax.get_yticklabels():
        label.set(text=shorten(label.get_text(), room), parse_math=False)
        label.set_bbox({"facecolor": theme.background, "edgecolor": "none", "pad": 1, "alpha": 0.8})


def _towards_contrast(theme: Theme, direction: str) -> ListedColormap:
    """Blues whose better end stands out most from the page, without the shades that vanish in it."""
    ends = (0.3, 1.0) if theme.name == "light" else (0.85, 0.1)
    shades = matplotlib.colormaps["Blues"](np.linspace(*ends, 256))
    return ListedColormap(shades if direction == "higher" else shades[::-1])


# -- the page's look ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pyplot(theme: Theme) -> Iterator[None]:
    """Let Optuna draw with pyplot, which leaves no open figure, no style and no other backend behind."""
    import matplotlib.pyplot as plt

    backend = matplotlib.get_backend(auto_select=False)
    open_before = plt.get_fignums()
    plt.switch_backend("agg")
    try:
        with matplotlib.rc_context(rc(theme)), _quiet():
            yield
    finally:
        for number in plt.get_fignums():
            if number not in open_before:
                plt.close(number)
        if backend:
            plt.switch_backend(backend)


def _objective(frame: pd.DataFrame, look: Look) -> str:
    return shorten(frame["quantity"].iloc[0], 1.6 if look.is_narrow else 4)


def _restyled(ax: Axes, look: Look, title: str, height: float, left: float = 0.6, right: float = 0.15) -> Figure:
    """The figure in the page's size, colours and type, whatever style Optuna chose; lengths in inches."""
    theme, figure = look.theme, ax.get_figure()
    assert isinstance(figure, Figure)
    figure.set_size_inches(4.2 if look.is_narrow else 8.4, height)
    figure.set_facecolor(theme.background)
    figure.set_layout_engine("none")
    width = figure.get_figwidth()
    place = (left / width, 0.5 / height, 1 - (left + right) / width, 1 - 0.9 / height)
    for own in figure.axes:
        own.set_position(place)
        own.set_facecolor(theme.background if own is ax else "none")
        own.tick_params(colors=theme.muted, labelsize=8.5, length=2)
        own.grid(False)
        for label in (own.xaxis.label, own.yaxis.label):
            label.set(color=theme.muted, fontsize=9, parse_math=False)
        for spine in own.spines.values():
            spine.set(edgecolor=theme.muted, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.set_title("", loc="center")
    ax.set_title(title, loc="left", color=theme.text, fontsize=10, fontweight="bold", pad=10, parse_math=False)
    return figure
