"""The main metric at equal cost: read off every run's curve where all cells have spent the same.

Between two evaluations the metric is taken to run straight in the logarithm of the clock, as curves of training fall
ever more slowly; nothing is read beyond the evaluations. Straight in the clock, a cell that is read between two of its
evaluations would come out too high, and it is the costlier cells that are.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from harness.records.files import number
from harness.records.metrics import metric
from reports.sections import Table
from reports.statistics.intervals import paired_difference
from reports.study.load import RecordedRun, Study
from reports.study.units import UNITS, Unit, rounded_text
from reports.study.verify import environment
from reports.study.words import be, listed
from reports.tables import results as tables
from reports.tables.cells import Cell
from reports.tables.results import MISSING, MetricResult

COSTS = (UNITS["train_gflops"], UNITS["seconds"])
"""The clocks that count a cost."""

TIMING = ("device", "threads")
"""Facts of the environment that seconds depend on; precision, compile and TF32 must agree in any study."""


# -- which seconds count ----------------------------------------------------------------------------------------------


def unequal_timing(study: Study) -> list[str]:
    """What keeps the seconds of the runs that count from being compared, as `threads (2: a seed 0; 4: b seed 0)`."""
    counted = dataclasses.replace(study, runs=study.counted(UNITS["seconds"]))
    settings = [setting for setting in environment(counted) if setting.name in TIMING and setting.differs]
    return [
        f"{setting.name} ({'; '.join(f'{value}: {listed(runs)}' for value, runs in setting.values.items())})"
        for setting in settings
    ]


def seconds_remarks(study: Study) -> list[str]:
    """Which runs stand for no seconds and why, and whether the others may be compared, in sentences."""
    shared = [run.label for run in study.runs if run.shared_device]
    if len(shared) == len(study.runs):
        return ["Every run shared its device with another, so there are no training seconds to compare."]
    whose = "its" if len(shared) == 1 else "their"
    left_out = f"{listed(shared)} shared {whose} device with another run and {be(shared)} left out of training seconds."
    return [left_out, *unequal_remarks(study)] if shared else unequal_remarks(study)


def unequal_remarks(study: Study) -> list[str]:
    """A sentence where the seconds of the runs that count may not be compared, and why."""
    unequal = unequal_timing(study)
    return [f"Training seconds are not comparable: runs differ in {listed(unequal)}."] if unequal else []


# -- reading curves ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A value read off a curve, and the steps of the evaluations it was read between: twice the same at one."""

    value: float
    steps: tuple[int, int]


def read_at(lines: Sequence[Mapping[str, Any]], name: str, clock: str, at: float) -> Reading | None:
    """A metric at a clock's value, linear in the clock's logarithm between evaluations; None outside of them."""
    for line in lines:
        if line[clock] == at:
            return Reading(number(line["metrics"][name]), (line["step"], line["step"]))
    for before, after in pairwise(lines):
        if 0 < before[clock] < at < after[clock]:
            share = math.log(at / before[clock]) / math.log(after[clock] / before[clock])
            first, last = number(before["metrics"][name]), number(after["metrics"][name])
            return Reading(first + share * (last - first), (before["step"], after["step"]))
    return None


@dataclass(frozen=True)
class EqualCost:
    """The main metric of every cell at one amount of a clock."""

    unit: Unit
    amount: float
    results: Mapping[str, MetricResult]
    """Results by cell."""
    steps: Mapping[str, tuple[int, int]]
    """Steps of the evaluations that a cell's values were read between: the first and the last over its seeds."""

    def steps_text(self, cell: str) -> Cell:
        """Where a cell's values come from: `700 to 800`, or `800` for those of an evaluation."""
        if cell not in self.steps:
            return Cell(MISSING)
        first, last = self.steps[cell]
        return Cell(f"{first:,}" if first == last else f"{first:,} to {last:,}", first)


def equal_costs(study: Study) -> list[EqualCost]:
    """At the largest amount that all cells share, for training GFLOPs and, where they may be compared, for seconds."""
    name = study.main_metrics[0]
    units = [unit for unit in COSTS if unit.name != "seconds" or not unequal_timing(study)]
    amounts = {unit: _common(study, name, unit) for unit in units}
    return [_at(study, name, unit, amount) for unit, amount in amounts.items() if math.isfinite(amount)]


def _common(study: Study, name: str, unit: Unit) -> float:
    """The largest amount at which every finished run was evaluated or had been; NaN without any.

    Runs that stopped early do not draw the others back: they have a value if they got that far. While no run is
    finished, those that go on decide.
    """
    evaluated = [run for run in study.counted(unit) if _lines(run, name)]
    finished = [run for run in evaluated if run.status == "finished"]
    deciding = finished or [run for run in evaluated if not run.ended_early]
    return min((_lines(run, name)[-1][unit.clock] for run in deciding), default=math.nan)


def _lines(run: RecordedRun, name: str) -> list[Mapping[str, Any]]:
    return [line for line in run.evaluations if name in line["metrics"]]


def _at(study: Study, name: str, unit: Unit, amount: float) -> EqualCost:
    readings = {cell: _readings(study, cell, name, unit, amount) for cell in study.cells}
    control = _values(study, readings[study.baseline]) if study.baseline else {}
    results = {cell: _result(study, cell, name, unit, readings[cell], control) for cell in study.cells}
    steps = {
        cell: (min(reading.steps[0] for reading in found.values()), max(reading.steps[1] for reading in found.values()))
        for cell, found in readings.items()
        if found
    }
    return EqualCost(unit, amount, results, steps)


def _readings(study: Study, cell: str, name: str, unit: Unit, amount: float) -> dict[int, Reading]:
    """By seed, for the runs that count and got there with finite values."""
    runs = [run for run in study.counted(unit) if run.cell == cell]
    found = {run.seed: read_at(_lines(run, name), name, unit.clock, amount) for run in runs}
    return {seed: reading for seed, reading in found.items() if reading and math.isfinite(reading.value)}


def _values(study: Study, readings: Mapping[int, Reading]) -> dict[int, float]:
    return {seed: readings[seed].value if seed in readings else math.nan for seed in study.seeds}


def _result(
    study: Study,
    cell: str,
    name: str,
    unit: Unit,
    readings: Mapping[int, Reading],
    control: Mapping[int, float],
) -> MetricResult:
    values = _values(study, readings)
    paired = bool(control) and cell != study.baseline
    difference = paired_difference(values, control, metric(name).direction) if paired else None
    return MetricResult(values, tables.absences(study, cell, unit), difference, tables.is_favoured(study, cell, name))


# -- renderings -------------------------------------------------------------------------------------------------------


def equal_cost_table(study: Study, found: Sequence[EqualCost]) -> pd.DataFrame:
    """As numbers, a row per clock and cell; columns of the metric are those of the final table."""
    name = study.main_metrics[0]
    rows = []
    for equal in found:
        for cell, result in equal.results.items():
            first, last = equal.steps.get(cell, (math.nan, math.nan))
            place = {"unit": equal.unit.name, "amount": equal.amount, "cell": cell, "baseline": study.baseline}
            steps = {"from_step": first, "to_step": last}
            rows.append(place | steps | tables.metric_numbers(name, result))
    return pd.DataFrame(rows)


STEM = "equal_cost"
"""The name of the files."""


def table(study: Study, equal: EqualCost) -> Table:
    """The main metric of every cell at one amount of a clock."""
    name = study.main_metrics[0]
    show = tables.shared_digits(equal.results.values())
    rows = [
        {
            "cell": cell,
            f"mean {name}": tables.mean_text(result, show),
            "every seed": tables.values_text(result, show),
            f"minus {study.baseline or 'a baseline'}": tables.difference_text(result.difference, show),
            "reading": tables.reading_text(result.difference),
            "from steps": equal.steps_text(cell),
        }
        for cell, result in equal.results.items()
    ]
    return Table("", f"At {rounded_text(equal.amount)} {equal.unit.words}", rows, notes=notes(study))


NOTE = (
    "The largest amount that all cells have reached. Between two evaluations the metric is interpolated linearly in "
    "the logarithm of the clock, never beyond the last; “from steps” says between which."
)


def notes(study: Study) -> list[str]:
    """How to read the tables, in sentences."""
    return [NOTE, *seconds_remarks(study), *tables.marks(study, study.main_metrics[:1])]
