"""Several studies together: the same cells in several settings, such as sizes and data sets.

Metrics of two settings are never averaged as they are: differences stay in a table a setting, and what goes over
settings is free of units, a change relative to the baseline at the same seed, a share of wins, or a ratio of costs.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.records.metrics import metric
from harness.records.run_folder import UserError
from reports.costs.targets_costs import CellCost, cell_costs, final_target
from reports.figures.plans import Plan
from reports.joint.profiles_figure import profiles_figure
from reports.result.improvement import cell_values
from reports.sections import Part, Section, Table
from reports.statistics.intervals import MIN_SEEDS, MIN_SETTINGS, MIN_VALUES, Interval, over_settings, wins
from reports.study.load import Study
from reports.study.units import UNITS
from reports.study.verify import RULES, flatten, short_text
from reports.study.words import count, listed
from reports.tables import results
from reports.tables.cells import Cell
from reports.tables.results import MISSING, CellResult

BOOTSTRAP_SEED = 0
"""The seed of the resamples, so that equal records give equal intervals."""

PROFILED = ("steps", "train_gflops", "seconds")
"""Clocks of the profiles. Images are steps times one batch size a study, so that their ratios are those of steps."""


# -- which studies go together ----------------------------------------------------------------------------------------


def check_together(studies: Sequence[Study]) -> None:
    """Whether the studies are the same comparison in different settings.

    Raises:
        UserError: there is no baseline, or two of them have one name, other cells, another baseline, another method
            behind a label, another main metric, or the same setting; names the field and both values.
    """
    first = studies[0]
    if not first.baseline:
        raise UserError(f"{first.name} has no baseline to compare with: report on these studies one by one")
    for place, study in enumerate(studies):
        if any(study.name == other.name for other in studies[:place]):
            raise UserError(f"two studies are named {study.name}: rename the folder of one, which is its name here")
        for what, value in FIELDS.items():
            if value(study) != value(first):
                raise UserError(
                    f"{what} differs between {first.name} ({value(first)}) and {study.name} ({value(study)}): "
                    "studies that are put together compare the same cells, so report on these one by one"
                )
    for place, study in enumerate(studies):
        for other in studies[:place]:
            if _setting(study) == _setting(other):
                raise UserError(
                    f"{other.name} and {study.name} have one setting (data, size and training agree): "
                    "runs of one setting belong into one study"
                )


FIELDS: dict[str, Callable[[Study], str]] = {
    "cells": lambda study: listed(sorted(study.cells), limit=20),
    "baseline": lambda study: study.baseline or "none",
    "method": lambda study: listed(sorted(f"{c}: {study.first(c).manifest['method']}" for c in study.cells), limit=20),
    "main metric": lambda study: kind_of(study.main_metrics[0]),
}
"""What the studies must share; the number of samples, which ends a metric's name, may be that of each data set."""


def kind_of(name: str) -> str:
    """A metric's name without its number of samples: `fid50k` -> `fid`."""
    return re.sub(r"_?\d+k?$", "", name)


def _setting(study: Study) -> tuple[str | None, ...]:
    """What a setting consists of, as the records tell."""
    named = {"data digest", "size", "training digest"}
    return tuple(rule.value(study.reference) for rule in RULES if rule.what in named)


# -- over all settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overall:
    """A cell against the baseline over all settings: each setting's values, one a seed at which both have one."""

    log_ratios: Sequence[Sequence[float]]
    """Logarithms of the cell's main metric over the baseline's."""
    wins: Sequence[Sequence[float]]
    """1, 0 or 1/2 for better, worse or equal; a diverged run is worse than any other."""

    @property
    def change(self) -> Interval:
        """Change of the main metric in percent, from the geometric mean of its ratios."""
        found = over_settings(self.log_ratios, _generator())
        return Interval(found.num, *(100 * math.expm1(v) for v in (found.mean, found.low, found.high)))

    @property
    def improvement(self) -> Interval:
        """Probability of improvement at a seed."""
        return over_settings(self.wins, _generator())


def _generator() -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(BOOTSTRAP_SEED))


def overall(studies: Sequence[Study], cell: str) -> Overall:
    """Over the studies' main metrics where each is compared."""
    ratios, won = [], []
    for study in studies:
        name = study.main_metrics[0]
        own, control = (cell_values(study, each, name) for each in (cell, study.baseline))
        pairs = [(own[s], control[s]) for s in sorted(own.keys() & control.keys())]
        pairs = [(a, b) for a, b in pairs if not (math.isnan(a) or math.isnan(b))]
        won.append([wins(a, b, metric(name).direction) for a, b in pairs])
        ratios.append([math.log(a / b) for a, b in pairs if 0 < a < math.inf and 0 < b < math.inf])
    return Overall(ratios, won)


# -- performance profiles ---------------------------------------------------------------------------------------------


def profile_frame(costs: Mapping[str, Sequence[CellCost]]) -> pd.DataFrame:
    """Performance profiles of the cost to target (Dolan and More, 2002, doi 10.1007/s101070100263).

    A problem is a setting at a seed; a cell's ratio is its cost over the least of all cells there, infinite for a miss.
    A row says at which share of the problems a cell's ratio is `ratio` or less. Left out are problems at which a cell
    has no run that counts, or one whose outcome is open.

    Args:
        costs: by study, its cells' costs to its own target, the same cells in the same order.
    """
    rows: list[dict[str, Any]] = []
    for unit in PROFILED:
        ratios = _ratios(costs, unit)
        if not ratios:
            continue
        cells = list(ratios[0])
        marks = sorted({1.0, *(each[cell] for each in ratios for cell in cells if each[cell] < math.inf)})
        for cell in cells:
            shares = {mark: sum(each[cell] <= mark for each in ratios) / len(ratios) for mark in marks}
            rows += [
                {"unit": unit, "cell": cell, "ratio": mark, "share": share, "num_problems": len(ratios)}
                for mark, share in shares.items()
            ]
    return pd.DataFrame(rows, columns=["unit", "cell", "ratio", "share", "num_problems"])


def _ratios(costs: Mapping[str, Sequence[CellCost]], unit: str) -> list[dict[str, float]]:
    """Every problem's ratios by cell."""
    found = []
    for cells in costs.values():
        clocks = {cost.cell: cost.clocks.get(unit) for cost in cells}
        for seed in sorted({seed for cost in cells for seed in cost.outcomes}):
            spent = {cell: _cost(clock, seed) for cell, clock in clocks.items()}
            if not any(math.isnan(value) for value in spent.values()):
                least = min(spent.values())
                found.append({cell: v / least if v < math.inf else math.inf for cell, v in spent.items()})
    return found


def _cost(clock: Any, seed: int) -> float:
    if clock is None or seed not in clock.outcomes:
        return math.nan
    return clock.outcomes[seed].cost(clock.unit)


# -- sections ---------------------------------------------------------------------------------------------------------


def sections(studies: Sequence[Study]) -> list[Section]:
    """What several studies say together; cells in the order of the first study."""
    profile = _profile_section(studies)
    return [
        Section(name="overall", title="Over all settings", parts=[Part(_overall_table(studies))]),
        *([profile] if profile else []),
        Section(name="differences", title="Each setting", parts=[Part(_difference_table(studies))]),
        Section(name="settings", title="What differs between the settings", parts=[Part(_settings_table(studies))]),
    ]


def headline(studies: Sequence[Study]) -> list[str]:
    """What was put together, and what the intervals over all settings allow to say."""
    names, others = [study.name for study in studies], _others(studies[0])
    first = f"{count(len(studies), 'setting')} of one comparison: {listed(names)}; {count(len(others), 'cell')} "
    first += f"against {studies[0].baseline}."
    changes = {cell: overall(studies, cell).change for cell in others}
    bounded = {cell: change for cell, change in changes.items() if math.isfinite(change.low)}
    if not bounded:
        return [first, TOO_FEW]
    texts = [f"{cell} {_percent_text(change)}{_held(change)}" for cell, change in bounded.items()]
    name = kind_of(studies[0].main_metrics[0])
    return [first, f"Change of {name} against {studies[0].baseline}, over seeds and settings: {listed(texts)}."]


def _held(change: Interval) -> str:
    return " (not separated)" if change.low <= 0 <= change.high else ""


TOO_FEW = (
    f"An interval over settings takes {MIN_SETTINGS} settings at least, {MIN_SEEDS} seeds in each and {MIN_VALUES} "
    "pairs in all."
)


def _others(study: Study) -> list[str]:
    return [cell for cell in study.cells if cell != study.baseline]


def _overall_table(studies: Sequence[Study]) -> Table:
    baseline, others = studies[0].baseline, _others(studies[0])
    found = {cell: overall(studies, cell) for cell in others}
    rows, numbers = [], []
    for cell, each in found.items():
        change, better = each.change, each.improvement
        means = [np.mean(w) for w in each.wins if w]
        num_better = sum(m > 0.5 for m in means)
        rows.append(
            {
                "cell": cell,
                f"change against {baseline} [95%]": _percent_text(change),
                "probability of improvement [95%]": _share_text(better),
                "settings mostly better": Cell(f"{num_better} of {len(means)}", float(num_better)),
                "pairs": Cell(f"{change.num} of {better.num}", change.num),
            }
        )
        numbers.append({"cell": cell, "baseline": baseline} | _columns("change_percent", change))
        numbers[-1] |= _columns("improvement", better)
    return Table("overall", f"Against {baseline}, over seeds and settings", rows, numbers, _overall_notes(studies))


def _columns(name: str, found: Interval) -> dict[str, Any]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_pairs": found.num}


def _overall_notes(studies: Sequence[Study]) -> list[str]:
    name, baseline = studies[0].main_metrics[0], studies[0].baseline
    return [
        f"Change: {kind_of(name)} of the cell over that of {baseline} at the same seed, geometric mean over the seeds "
        f"of a setting and then over settings, which weigh alike; {metric(name).direction} is better. Runs without a "
        "finite value are left out of it, and “pairs” says how many there are.",
        f"Probability of improvement: at which share of the seeds the cell is better than {baseline} at the same seed, "
        "mean over settings; a diverged run is worse than any other.",
        "Intervals: percentile bootstrap of seeds within each setting (Agarwal et al., 2021). They are about these "
        "settings and say nothing of others, and with few seeds they are too narrow: 85% covered at 3 seeds x 4 "
        f"settings. {TOO_FEW}",
    ]


def _percent_text(change: Interval) -> Cell:
    """`−4.2% [−6.0, −2.5]`."""
    if not math.isfinite(change.mean):
        return Cell(MISSING)
    show = results.Digits(1)
    bounds = f" [{show(change.low, True)}, {show(change.high, True)}]" if math.isfinite(change.low) else ""
    return Cell(f"{show(change.mean, True)}%{bounds}", change.mean)


def _share_text(share: Interval) -> Cell:
    if not math.isfinite(share.mean):
        return Cell(MISSING)
    bounds = f" [{share.low:.2f}, {share.high:.2f}]" if math.isfinite(share.low) else ""
    return Cell(f"{share.mean:.2f}{bounds}", share.mean)


# -- differences of each setting --------------------------------------------------------------------------------------


def _difference_table(studies: Sequence[Study]) -> Table:
    rows, numbers, names = [], [], {study.main_metrics[0] for study in studies}
    for study in studies:
        found = results.results(study)
        name = study.main_metrics[0]
        for row in found:
            if row.cell != study.baseline:
                texts = _difference_texts(study, found, row)
                rows.append({k: v for k, v in texts.items() if k != "metric" or len(names) > 1})
                numbers.append(
                    {"cell": row.cell, "study": study.name, "metric": name, "baseline": study.baseline}
                    | {"baseline_mean": _control(study, found).metrics[name].mean}
                    | {
                        key.replace(name, "value", 1): value
                        for key, value in results.metric_numbers(name, row.metrics[name]).items()
                    }
                )
    notes = results.footnotes(studies[0], [])[1:]
    marks = [mark for study in studies for mark in results.marks(study, study.main_metrics[:1])]
    title = f"{kind_of(studies[0].main_metrics[0])}: each setting's differences to {studies[0].baseline}"
    return Table("differences", title, rows, numbers, [*notes, *dict.fromkeys(marks)])


def _control(study: Study, rows: Sequence[CellResult]) -> CellResult:
    return next(row for row in rows if row.cell == study.baseline)


def _difference_texts(study: Study, rows: Sequence[CellResult], row: CellResult) -> dict[str, str]:
    name = study.main_metrics[0]
    show, result = results.digits(rows, name), row.metrics[name]
    return {
        "cell": row.cell,
        "study": study.name,
        "metric": name,
        f"{study.baseline}, mean": show(_control(study, rows).metrics[name].mean),
        "mean": results.mean_text(result, show),
        "every seed": results.values_text(result, show),
        f"minus {study.baseline} [95%]": results.difference_text(result.difference, show),
        "reading": results.reading_text(result.difference),
    }


NOT_SETTINGS = ("study", "cell", "method", "seed", "sections", "output", "data.path")
"""Fields of the config that say nothing of a setting; a method's own differ from cell to cell."""


def _settings_table(studies: Sequence[Study]) -> Table:
    """Fields of the config that are not the same in all studies."""
    flat = [{k: v for k, v in flatten(study.reference.config).items() if k} for study in studies]
    fields = [
        field
        for field in dict.fromkeys(field for each in flat for field in each)
        if not field.startswith(NOT_SETTINGS) and len({str(each.get(field)) for each in flat}) > 1
    ]
    seeds = {"field of the config": "seeds"} | {study.name: ", ".join(map(str, study.seeds)) for study in studies}
    rows = [seeds, *({"field of the config": f, **_values(studies, flat, f)} for f in fields)]
    return Table("settings", "Settings of the studies", rows, rows, ["Of each study's first run with a protocol."])


def _values(studies: Sequence[Study], flat: Sequence[Mapping[str, Any]], field: str) -> dict[str, str]:
    values = [each.get(field, MISSING) for each in flat]
    return {study.name: short_text(value) for study, value in zip(studies, values, strict=True)}


# -- the profiles' section --------------------------------------------------------------------------------------------


def _profile_section(studies: Sequence[Study]) -> Section | None:
    """None where no study has a target and runs that stand to it."""
    costs: dict[str, Sequence[CellCost]] = {}
    for study in studies:
        if target := final_target(study):
            by_cell = {cost.cell: cost for cost in cell_costs(study, target)}
            costs[study.name] = [by_cell[cell] for cell in studies[0].cells]
    frame = profile_frame(costs)
    if not len(frame):
        return None
    counts = frame.drop_duplicates("unit")
    nums = [f"{num} on {UNITS[unit].words}" for unit, num in zip(counts["unit"], counts["num_problems"], strict=True)]
    caption = (
        f"At which share of the problems a cell reached {studies[0].baseline}'s final value for at most so many times "
        f"the cost of the cheapest cell. A problem is a setting at a seed: {listed(nums)}. What a cell never reached "
        "counts against it at any ratio, so its line ends below 100%."
    )
    plan = Plan("profiles", frame, profiles_figure, "Performance profiles of the cost to target", caption)
    sentence = (
        "Each setting has its own target, the median over seeds of its baseline's last value. A profile depends on "
        "which cells are in it: read the highest line, and not the order of those below it (Gould and Scott, 2016)."
    )
    without = [study.name for study in studies if study.name not in costs]
    verb, whose = ("has", "its") if len(without) == 1 else ("have", "their")
    why = f"no target, as {whose} {studies[0].baseline} has no final value, and no part in them"
    left_out = f"{listed(without)} {verb} {why}."
    sentences = [sentence, *([left_out] if without else [])]
    return Section(name="profiles", title="Performance profiles", sentences=sentences, plans=[plan])
