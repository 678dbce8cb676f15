"""The tables of an ablation: one for every axis as in papers, or the list of a search's trials.

Text for the terminal, the page, Markdown and LaTeX, with numbers beside it for CSV. Differences are to the default
setting of the same method, paired by seed.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.records.ablation import Axis, Subject, Trial
from harness.records.metrics import metric
from harness.records.run_folder import UserError
from reports.ablation.trials import Ablation, duplicates, level_text, load_ablation
from reports.sections import Table
from reports.study.load import load_study
from reports.study.units import rounded_text
from reports.study.words import count, listed
from reports.tables.cells import Cell
from reports.tables.results import (
    MISSING,
    MetricResult,
    difference_text,
    marks,
    mean_text,
    reading_cell,
    seeds_values,
)

NUM_SHOWN = 20
"""Trials of a search that the page shows; the CSV holds all."""

NUM_IN_TERMINAL = 10


@dataclass(frozen=True)
class Level:
    """A row of an axis's table: the axis at one level, the others at their default."""

    axis: Axis
    value: Any
    cell: str
    """"" where the ablation has no such setting."""
    result: MetricResult
    over_others: float
    """Mean of the cells' means over the other axes' levels; NaN where one of them has no value, and without others."""
    num_others: int
    """Cells of that mean."""

    @property
    def is_default(self) -> bool:
        return bool(self.value == self.axis.default)


def levels(ablation: Ablation, subject: Subject, axis: Axis) -> list[Level]:
    """Every level of an axis."""
    return [_level(ablation, subject, axis, value) for value in axis.all_levels]


def _level(ablation: Ablation, subject: Subject, axis: Axis, value: Any) -> Level:
    trial = ablation.find(subject, {**subject.default, axis.name: value})
    cell = trial.cell if trial else ""
    result = ablation.result(cell, subject.default_cell)
    means = list(_means_at(ablation, subject, axis, value)) if has_product(ablation, subject) else []
    return Level(axis, value, cell, result, fmean(means) if means else math.nan, len(means))


def _means_at(ablation: Ablation, subject: Subject, axis: Axis, value: Any) -> Iterator[float]:
    """Means of the settings that have this level."""
    for trial in ablation.of(subject):
        if trial.setting[axis.name] == value:
            yield ablation.result(trial.cell, subject.default_cell).mean


def has_product(ablation: Ablation, subject: Subject) -> bool:
    """Whether settings differ from the default on more than one axis, as in a grid over several."""
    return ablation.kind == "grid" and any(
        sum(trial.setting[axis.name] != axis.default for axis in subject.axes) > 1 for trial in ablation.of(subject)
    )


# -- tables of axes -------------------------------------------------------------------------------------------------


def tables(ablation: Ablation) -> list[Table]:
    """One table for every axis of a grid, a single one of axes varied in turn, the trials of every searched method."""
    if ablation.is_search:
        return [search_table(ablation, subject) for subject in ablation.subjects]
    (subject,) = ablation.subjects
    if ablation.kind == "one_at_a_time":
        return [_turns_table(ablation, subject)]
    return [_axis_table(ablation, subject, axis) for axis in subject.axes]


def _axis_table(ablation: Ablation, subject: Subject, axis: Axis) -> Table:
    """Levels of one axis, with the control in front."""
    found = levels(ablation, subject, axis)
    others = [other.name for other in subject.axes if other is not axis]
    over = f"mean over {', '.join(others)}" if has_product(ablation, subject) else ""
    control = ablation.result(ablation.control, subject.default_cell)
    rows = [{axis.name: ablation.control, **_texts(ablation, control), **({over: MISSING} if over else {})}]
    for level in found:
        text = _over_text(ablation, level)
        rows.append({axis.name: _marked(level), **_level_texts(ablation, level), **({over: text} if over else {})})
    fixed = ", ".join(f"{name} = {level_text(subject.default[name])}" for name in others)
    return Table(
        stem=f"axis_{_file_name(axis.name)}",
        title=f"{axis.name} of {subject.method}" + (f", with {fixed}" if fixed else ""),
        rows=rows,
        numbers=[_control_numbers(ablation, subject), *(_level_numbers(ablation, level) for level in found)],
        notes=notes(ablation),
    )


def _turns_table(ablation: Ablation, subject: Subject) -> Table:
    """As papers print it: control, default, then axis by axis the levels that are not the default's."""
    control = ablation.result(ablation.control, subject.default_cell)
    default = ablation.result(subject.default_cell, subject.default_cell)
    rows = [
        {"axis": ablation.control, "level": "", **_texts(ablation, control)},
        {"axis": "default", "level": _setting_text(subject.default), **_texts(ablation, default, is_default=True)},
    ]
    numbers = [_control_numbers(ablation, subject)]
    for axis in subject.axes:
        for level in levels(ablation, subject, axis):
            numbers.append(_level_numbers(ablation, level))
            if not level.is_default:
                rows.append({"axis": axis.name, "level": level_text(level.value), **_level_texts(ablation, level)})
    return Table("axes", f"{subject.method}, one axis at a time", rows, numbers, notes(ablation))


def _file_name(axis: str) -> str:
    """A name that stays in its folder, whatever a record calls its axis."""
    return re.sub(r"[^\w+-]", "_", axis)[:100]


def _marked(level: Level) -> str:
    return f"{level_text(level.value)} (default)" if level.is_default else level_text(level.value)


def _level_texts(ablation: Ablation, level: Level) -> dict[str, str]:
    if not level.cell:
        return dict.fromkeys(_texts(ablation, level.result), MISSING) | {"every seed": "not asked for"}
    return _texts(ablation, level.result, level.is_default)


def _over_text(ablation: Ablation, level: Level) -> Cell:
    if not math.isfinite(level.over_others):
        return Cell(MISSING)
    return Cell(f"{ablation.show(level.over_others)} ({level.num_others})", level.over_others)


def _texts(ablation: Ablation, result: MetricResult, is_default: bool = False) -> dict[str, str]:
    """A result as text, with its difference to the default."""
    show = ablation.show
    return {
        "mean": mean_text(result, show),
        "spread": show(result.spread),
        "n": Cell(str(len(result.finite)), len(result.finite)),
        "every seed": seeds_values(result, show),
        "minus default [95%]": MISSING if is_default else difference_text(result.difference, show),
        "reading": "default" if is_default else _reading(result),
    }


def _reading(result: MetricResult) -> str:
    """What the difference says, and at how many seeds it is for the better: `not separated, 2 of 2 better`."""
    difference = result.difference
    if difference is None or not difference.by_seed:
        return "no pair of seeds"
    first = "no interval" if difference.reading == "one seed" else difference.reading
    return reading_cell(difference, f"{first}, {difference.num_better} of {difference.interval.num} better")


def _setting_text(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {level_text(value)}" for name, value in setting.items())


# -- the trials of a search -----------------------------------------------------------------------------------------


def search_table(ablation: Ablation, subject: Subject) -> Table:
    """Control and default, then the settings of a search, best first; text of the first ones, numbers of all."""
    ranked = ablation.ranked(subject)
    default = [trial for trial in ranked if trial.cell == subject.default_cell]
    shown = [trial for trial in ranked[:NUM_SHOWN] if trial not in default]
    control = ablation.result(ablation.control, subject.default_cell)
    empty = dict.fromkeys((axis.name for axis in subject.axes), "")
    rows = [{"trial": ablation.control, **empty, **_texts(ablation, control), "state": ""}]
    rows += [_trial_texts(ablation, subject, trial) for trial in (*default, *shown)]
    alone = len(ablation.subjects) == 1
    return Table(
        stem="trials" if alone else f"trials_{_file_name(subject.method)}",
        title=f"Trials of {subject.method}, best first",
        rows=rows,
        numbers=[_control_numbers(ablation, subject), *trial_numbers(ablation, subject)],
        notes=[*search_notes(ablation, subject), *notes(ablation)],
    )


def _trial_texts(ablation: Ablation, subject: Subject, trial: Trial) -> dict[str, str]:
    is_default = trial.cell == subject.default_cell
    result = ablation.result(trial.cell, subject.default_cell)
    return {
        "trial": f"{trial.number} (default)" if is_default else str(trial.number),
        **{axis.name: _level_cell(trial.setting[axis.name]) for axis in subject.axes},
        **_texts(ablation, result, is_default),
        "state": trial.state,
    }


def _level_cell(value: Any) -> str:
    """A level, which sorts as a number where it is one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(level_text(value), value) if is_number else level_text(value)


def search_notes(ablation: Ablation, subject: Subject) -> list[str]:
    """How far a search is, what of it came to nothing, what pruning saved, and what to make of the best value."""
    trials = ablation.of(subject)
    states = [f"{num} {state}" for state in ("pruned", "diverged", "running") if (num := _num(trials, state))]
    again = len(duplicates(trials))
    states += [f"{again} of a setting that had been tried"] if again else []
    over = sum(trial.is_over for trial in trials)
    found = [
        f"{over} of {ablation.num_asked} trials of {subject.method} are over"
        + (f", {listed(states)}." if states else ".")
    ]
    if ablation.pruner != "none":
        found.append(saved_text(ablation, subject))
    if len(ablation.ranked(subject)) > NUM_SHOWN:
        found.append(f"The first {NUM_SHOWN} settings are shown; the CSV beside the page holds all.")
    return [*found, *search_remarks(ablation)]


def search_remarks(ablation: Ablation) -> list[str]:
    """How far the best value of a search can be trusted, and whether its order can be had again."""
    seeds = ",".join(map(str, ablation.seeds))
    found = [
        f"The best of many trials looks better on the seeds it was chosen by than it is: seeds {seeds} may not be "
        f"reported. Confirm it on others, with ditbench compare --tuned {ablation.study.path} and other --seeds."
    ]
    if len({worker for trial in ablation.trials for worker in trial.workers}) > 1:
        found.append(
            "More than one worker took part in the search: which setting is tried next depends on which runs have "
            "ended, so its order cannot be reproduced."
        )
    return found


def _num(trials: Sequence[Trial], state: str) -> int:
    return sum(trial.state == state for trial in trials)


def saved(ablation: Ablation, subject: Subject) -> tuple[float, float]:
    """What pruning saved of a method's trials: in units of the budget, and as a share of what they would have cost.

    Trials of a setting that an earlier one had cost nothing either way; waiting and running ones are left out.
    """
    trials = [trial for trial in ablation.of(subject) if trial not in duplicates(ablation.of(subject))]
    ended = [trial for trial in trials if trial.is_over]
    share = sum(1 - trial.spent for trial in ended if trial.state == "pruned")
    return share * len(ablation.seeds) * ablation.study.budget, share / len(ended) if ended else 0.0


def saved_text(ablation: Ablation, subject: Subject) -> str:
    """That as a sentence."""
    amount, share = saved(ablation, subject)
    pruner = {"hyperband": "Hyperband"}.get(ablation.pruner, f"{ablation.pruner} pruning")
    pruner = pruner[0].upper() + pruner[1:]
    unit = ablation.study.unit
    text = f"{amount:,.0f} {unit.words}" if unit.is_whole else f"{rounded_text(amount)} {unit.words}"
    return f"{pruner} saved {text}, {100 * share:.0f}% of what these trials would have spent."


# -- numbers --------------------------------------------------------------------------------------------------------


def _numbers(ablation: Ablation, cell: str, result: MetricResult) -> dict[str, Any]:
    """The columns that every row of a CSV has."""
    difference = result.difference
    return {
        "objective": ablation.objective,
        "point": ablation.study.point,
        "cell": cell,
        "mean": result.mean,
        "spread": result.spread,
        "n": len(result.finite),
        **{f"seed{seed}": value for seed, value in result.values.items()},
        "difference": difference.interval.mean if difference else math.nan,
        "low": difference.interval.low if difference else math.nan,
        "high": difference.interval.high if difference else math.nan,
        "pairs": difference.interval.num if difference else 0,
        "seeds_better": difference.num_better if difference else 0,
        "reading": difference.reading if difference else "",
    }


def _control_numbers(ablation: Ablation, subject: Subject) -> dict[str, Any]:
    result = ablation.result(ablation.control, subject.default_cell)
    front = {} if ablation.is_search else {"axis": "", "level": "", "is_default": False}
    return {"method": ablation.control, **front, **_numbers(ablation, ablation.control, result)}


def _level_numbers(ablation: Ablation, level: Level) -> dict[str, Any]:
    return {
        "method": ablation.subjects[0].method,
        "axis": level.axis.name,
        "level": level_text(level.value),
        "is_default": level.is_default,
        **_numbers(ablation, level.cell, level.result),
        "mean_over_others": level.over_others,
        "num_others": level.num_others,
    }


def trial_numbers(ablation: Ablation, subject: Subject) -> list[dict[str, Any]]:
    """Every trial of a method as numbers, best setting first, with its whole setting and the share that it spent."""
    place = {trial.cell: rank for rank, trial in enumerate(ablation.ranked(subject))}
    again = duplicates(ablation.of(subject))
    return [
        {
            "method": subject.method,
            "trial": trial.number,
            "state": trial.state,
            "is_default": trial.cell == subject.default_cell,
            "is_duplicate": trial in again,
            "spent": trial.spent,
            **{axis.name: level_text(trial.setting[axis.name]) for axis in subject.axes},
            **_numbers(ablation, trial.cell, ablation.result(trial.cell, subject.default_cell)),
        }
        for trial in sorted(ablation.of(subject), key=lambda trial: (place[trial.cell], trial.number))
    ]


# -- reading --------------------------------------------------------------------------------------------------------


def notes(ablation: Ablation) -> list[str]:
    """How to read the tables, in sentences."""
    name = ablation.objective
    found = [
        f"{name} {ablation.study.after}, {metric(name).direction} is better: mean, sample standard deviation over "
        f"{count(len(ablation.seeds), 'seed')} and every seed's value.",
        "Differences to the default setting are paired by seed, with a 95% Student-t interval; an interval that holds "
        "0 reads “not separated”, and one pair has no interval.",
    ]
    if any(has_product(ablation, subject) for subject in ablation.subjects):
        found.append("The last column is the mean over all settings with that level, and how many they are.")
    return found + marks(ablation.study, [name])


def terminal_tables(study: Path) -> list[tuple[str, list[dict[str, str]]]]:
    """The tables of a study's ablation as text, each with its title: narrow enough for a terminal.

    Raises:
        UserError: the study cannot be read, or is no ablation.
    """
    ablation = load_ablation(load_study(study))
    if ablation is None:
        raise UserError(f"{study} is no ablation: give the study of `ditbench ablate`")
    num = 2 + NUM_IN_TERMINAL if ablation.is_search else None
    return [(table.title, [dict(row) for row in table.rows[:num]]) for table in tables(ablation)]
