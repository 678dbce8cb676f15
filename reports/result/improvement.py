"""Probability of improvement in the report: how often a run of a cell is better than one of the baseline."""

import math
from typing import Any

from harness.records.metrics import metric
from reports.sections import Part, Section, Table
from reports.statistics.intervals import Improvement, improvement
from reports.study.load import RecordedRun, Study
from reports.study.words import count
from reports.tables import results
from reports.tables.cells import Cell
from reports.tables.results import MISSING


def section(study: Study) -> Section | None:
    """A row for every main metric and a column for every cell; None where no cell is compared with a baseline."""
    others = [cell for cell in study.cells if cell != study.baseline]
    if not study.baseline or not others:
        return None
    found = {name: {cell: cell_improvement(study, cell, name) for cell in others} for name in study.main_metrics}
    table = Table(
        stem="improvement",
        title=f"A run better than {study.baseline}'s, {study.after}",
        rows=[
            {"probability, by metric": name} | {cell: _text(study, cell, name, each) for cell, each in row.items()}
            for name, row in found.items()
        ],
        numbers=[_numbers(study, name, row) for name, row in found.items()],
        notes=_notes(study, [each for row in found.values() for each in row.values()]),
    )
    return Section(name="improvement", title="Probability of improvement", parts=[Part(table)])


def cell_improvement(study: Study, cell: str, name: str) -> Improvement:
    """Over a cell's runs and the baseline's where the study is compared; a diverged run is worse than any other."""
    return improvement(cell_values(study, cell, name), cell_values(study, study.baseline, name), metric(name).direction)


def cell_values(study: Study, cell: str, name: str) -> dict[int, float]:
    """By seed where the study is compared; infinitely bad for a diverged run, NaN for any other without a value."""
    return {run.seed: _value(study, run, name) for run in study.timed if run.cell == cell}


def _value(study: Study, run: RecordedRun, name: str) -> float:
    value = run.value(name, study.point)
    if math.isnan(value) and run.status == "diverged":
        return math.inf if metric(name).direction == "lower" else -math.inf
    return value


def _text(study: Study, cell: str, name: str, found: Improvement) -> Cell:
    """`1.00 of 3 seeds (0.89 of 9)`, with the mark of a metric that favours the cell."""
    if not found.num_all:
        return Cell(MISSING)
    mark = f" {results.BIAS_MARK}" if results.is_favoured(study, cell, name) else ""
    paired = f"{found.paired:.2f} of {count(found.num_pairs, 'seed')}" if found.num_pairs else MISSING
    return Cell(f"{paired} ({found.over_all:.2f} of {found.num_all}){mark}", found.paired)


def _numbers(study: Study, name: str, row: dict[str, Improvement]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"metric": name, "direction": metric(name).direction, "baseline": study.baseline}
    for cell, found in row.items():
        numbers |= {
            f"{cell}_paired": found.paired,
            f"{cell}_pairs": found.num_pairs,
            f"{cell}_over_all": found.over_all,
            f"{cell}_all_pairs": found.num_all,
        }
    return numbers


def _notes(study: Study, found: list[Improvement]) -> list[str]:
    num = max(each.num_pairs for each in found)
    notes = [
        f"The share of seeds at which the cell is better than {study.baseline} at the same seed, equal values counting "
        "half. It comes first because runs at one seed share initial weights, batches, times and noise. In brackets: "
        "the share of all pairs of a run of each, whatever their seeds (Agarwal et al., 2021), on which the luck of "
        "the seeds weighs as well. A run that diverged is worse than any other.",
    ]
    if num:
        notes.append(
            f"Of cells that differ from {study.baseline} in nothing, 1 in {2**num:,} is better at all of "
            f"{count(num, 'seed')}: these are descriptions, and the intervals of the differences say what is separated."
        )
    return [*notes, *results.marks(study, study.main_metrics)]
