"""What a report holds of an ablation: its figures and its tables, for the folder and for the page."""

from collections.abc import Mapping
from functools import partial

import pandas as pd

from harness.records.ablation import Subject
from harness.records.metrics import metric
from reports.ablation import figures as ablation_figures
from reports.ablation import trial_figures
from reports.ablation.findings import NUM_AXES, axis_sentence
from reports.ablation.tables import tables, trial_numbers
from reports.ablation.trials import Ablation
from reports.figures.plans import Plan
from reports.sections import Part, Section, TableFile
from reports.study.words import listed


def section(ablation: Ablation) -> Section:
    """Curves and heatmaps of a grid, the tables, then the figures of the trials."""
    trials = Part(title="Figures of the trials", plans=_trial_plans(ablation), sentences=importance_notes(ablation))
    return Section(
        name="ablation",
        title="Ablation",
        plans=_grid_plans(ablation),
        parts=[*parts(ablation), trials],
        files=[TableFile(name, frame) for name, frame in numbers(ablation).items()],
    )


def parts(ablation: Ablation) -> list[Part]:
    """The tables in their order on the page, of axes or of trials, each with its sentences."""
    return [Part(table, said) for table, said in zip(tables(ablation), _sentences(ablation), strict=True)]


def _sentences(ablation: Ablation) -> list[list[str]]:
    """What stands in front of each of an ablation's own tables: sentences that the top of the page has no room for."""
    if ablation.is_search:
        return [[] for _ in ablation.subjects]
    (subject,) = ablation.subjects
    each = [
        [axis_sentence(ablation, subject, axis)] if place >= NUM_AXES else [] for place, axis in enumerate(subject.axes)
    ]
    return [[said for found in each for said in found]] if ablation.kind == "one_at_a_time" else each


def numbers(ablation: Ablation) -> dict[str, pd.DataFrame]:
    """Tables that stand beside the page as numbers alone: the whole list of a grid's trials."""
    if ablation.is_search:
        return {}
    return {"trials": pd.DataFrame(trial_numbers(ablation, ablation.subjects[0]))}


# -- figures --------------------------------------------------------------------------------------------------------


def _grid_plans(ablation: Ablation) -> list[Plan]:
    """Curves and heatmaps of a grid; none of a search."""
    if ablation.is_search:
        return []
    (subject,) = ablation.subjects
    return [*_level_plans(ablation, subject), *_heatmap_plans(ablation, subject)]


def _level_plans(ablation: Ablation, subject: Subject) -> list[Plan]:
    frame = ablation_figures.level_frame(ablation, subject)
    if frame["value"].isna().all():
        return []
    names = listed([axis.name for axis in subject.axes], limit=10)
    caption = (
        f"{metric(ablation.objective).title} ({ablation.objective}) {ablation.study.after} over the levels of {names}, "
        "each with the other axes at their default. Thick: means over seeds, with their 95% Student-t intervals; thin: "
        f"single seeds; the ring marks the default, the dashed line the mean of {ablation.control}."
    )
    if ablation_figures.is_cut(frame):
        caption += " Intervals that reach far beyond the values are cut off at the frame; the tables hold them."
    return [
        Plan("axes", frame, ablation_figures.levels_figure, f"{ablation.objective} over levels of {names}", caption)
    ]


def _heatmap_plans(ablation: Ablation, subject: Subject) -> list[Plan]:
    found = []
    for place, (first, second) in enumerate(ablation_figures.pairs(ablation, subject), start=1):
        frame = ablation_figures.pair_frame(ablation, subject, first, second)
        others = [axis.name for axis in subject.axes if axis not in (first, second)]
        fixed = f", {listed(others)} at the default" if others else ""
        caption = (
            f"Means over seeds of {ablation.objective} {ablation.study.after}{fixed}. The brighter, the better; the "
            "frame of dashes marks the default. Differences between neighbours may be the seeds' doing: trials.csv has "
            "their intervals."
        )
        alt = f"{ablation.objective} by {first.name} and {second.name}"
        found.append(Plan(f"heatmap_{place}", frame, ablation_figures.heatmap_figure, alt, caption))
    return found


def _trial_plans(ablation: Ablation) -> list[Plan]:
    """The history of all methods, and for each its parallel coordinates and, from enough trials, importances."""
    frames = {subject: trial_figures.trial_frame(ablation, subject) for subject in ablation.subjects}
    ready = {subject: frame for subject, frame in frames.items() if frame["value"].notna().sum() > 1}
    if not ready:
        return []
    plans = [_history_plan(ablation, ready)]
    for place, (subject, frame) in enumerate(ready.items(), start=1):
        plans.append(_parallel_plan(ablation, subject, frame, place))
        if frame["value"].notna().sum() >= trial_figures.LEAST_TRIALS:
            plans += _importance_plans(ablation, subject, frame, place)
    return plans


def _history_plan(ablation: Ablation, frames: Mapping[Subject, pd.DataFrame]) -> Plan:
    caption = (
        f"The history of the trials: the mean over seeds of {ablation.objective} by number of trial (dots), and the "
        "best so far (line)."
    )
    if not ablation.is_search:
        caption += " In a grid the numbers are the order in which settings were asked for, and no search."
    frame = pd.concat(frames.values(), ignore_index=True)
    return Plan("history", frame, trial_figures.history_figure, f"{ablation.objective} by number of trial", caption)


def _parallel_plan(ablation: Ablation, subject: Subject, frame: pd.DataFrame, place: int) -> Plan:
    caption = (
        f"Parallel coordinates of {subject.method}: a line for every trial with a value, from "
        f"{ablation.objective} through its level on every axis. The better, the stronger the line."
    )
    draw = partial(trial_figures.parallel_figure, axes=subject.axes)
    return Plan(f"parallel_{place}", frame, draw, f"Settings of {subject.method} by {ablation.objective}", caption)


def _importance_plans(ablation: Ablation, subject: Subject, frame: pd.DataFrame, place: int) -> list[Plan]:
    importances = trial_figures.importance_frame(frame, subject.axes)
    if importances.empty:
        return []
    caption = (
        f"Importance of the axes of {subject.method} for {ablation.objective}, by functional ANOVA over "
        f"{importances['num_trials'].iloc[0]} finished trials (Optuna, seed {trial_figures.SEED}): the share of the "
        "variance between settings that each axis explains alone. It says nothing of which level is better."
    )
    alt = f"Importance of the axes of {subject.method}"
    return [Plan(f"importance_{place}", importances, trial_figures.importance_figure, alt, caption)]


def importance_notes(ablation: Ablation) -> list[str]:
    """Why there are no importances, for each method that has none."""
    found = []
    for subject in ablation.subjects:
        num = int(trial_figures.trial_frame(ablation, subject)["value"].notna().sum())
        if num < trial_figures.LEAST_TRIALS:
            found.append(
                f"Importance of the axes of {subject.method}: {num} of {trial_figures.LEAST_TRIALS} finished trials. "
                "From fewer it would be noise, so it is not shown."
            )
    return found
