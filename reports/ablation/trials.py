"""An ablation: its record `ablation.json`, joined with the runs of its study.

A trial is one setting of a method, which is one cell of the study; its runs are that cell at every seed. The control
is a cell too, and no trial. Every value comes from the runs, at the study's last evaluation point; the record says
which trials there are and how each of them stands.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.records.ablation import ABLATION_RECORD, RecordedAblation, Subject, Trial, read_ablation
from harness.records.metrics import metric
from harness.records.run_folder import UserError
from reports.statistics.intervals import Direction, paired_difference
from reports.study.load import Study
from reports.tables.results import Digits, MetricResult, absences, is_favoured, shared_digits


@dataclass(frozen=True, kw_only=True)
class Ablation(RecordedAblation):
    """An ablation on record with the runs of its study. Its objective is one that the runs have recorded."""

    study: Study

    @property
    def direction(self) -> Direction:
        return metric(self.objective).direction

    @property
    def sign(self) -> int:
        """1 where lower values are better, else -1."""
        return 1 if self.direction == "lower" else -1

    def result(self, cell: str, default_cell: str) -> MetricResult:
        """The objective of a cell over the seeds of the ablation, beside that of its method's default."""
        values = self._values(cell)
        has_runs = cell in self.study.cells
        known = absences(self.study, cell, self.study.unit)
        absent = {seed: known.get(seed, "waiting") for seed in self.seeds}
        paired = paired_difference(values, self._values(default_cell), self.direction)
        return MetricResult(
            values=values,
            absent=absent,
            difference=None if cell == default_cell else paired,
            favoured=has_runs and is_favoured(self.study, cell, self.objective),
        )

    def _values(self, cell: str) -> dict[int, float]:
        """The objective by seed of the ablation; NaN where there is none."""
        runs = {run.seed: run for run in self.study.timed if run.cell == cell}
        return {
            seed: runs[seed].value(self.objective, self.study.point) if seed in runs else math.nan
            for seed in self.seeds
        }

    @cached_property
    def show(self) -> Digits:
        """Decimals of the objective, the same in every table."""
        cells = dict.fromkeys((self.control, *(trial.cell for trial in self.trials)))
        return shared_digits(self.result(cell, cell) for cell in cells)

    def ranked(self, subject: Subject) -> list[Trial]:
        """A method's settings, each once: those of `scored`, then the others by number."""
        scored = self.scored(subject)
        return [*scored, *(trial for trial in self._settings(subject) if trial not in scored)]

    def scored(self, subject: Subject) -> list[Trial]:
        """A method's settings that have a value, best mean first; of a search those that are complete.

        A pruned trial, or one that runs, may have a value at a seed or two, which is no mean to rank by.
        """
        found = [
            trial
            for trial in self._settings(subject)
            if self.result(trial.cell, subject.default_cell).finite
            and (trial.state == "complete" or not self.is_search)
        ]
        return sorted(found, key=lambda trial: self.sign * self.result(trial.cell, subject.default_cell).mean)

    def _settings(self, subject: Subject) -> list[Trial]:
        """The first trial of every setting, by number."""
        return list({trial.cell: trial for trial in reversed(self.of(subject))}.values())[::-1]

    def shown_cells(self) -> tuple[str, ...]:
        """Cells that stand for all where each takes a line or a column: control, defaults, best and, of one, worst."""
        cells = [self.control]
        for subject in self.subjects:
            scored = [trial.cell for trial in self.scored(subject)]
            cells += [subject.default_cell, *scored[:1]]
            if len(self.subjects) == 1:
                cells += scored[-1:]
        return tuple(cell for cell in dict.fromkeys(cells) if cell in self.study.cells)


def load_ablation(study: Study) -> Ablation | None:
    """The ablation of a study; None where it is none.

    Raises:
        UserError: the record is wrong, or its objective was not recorded by any run.
    """
    record = read_ablation(study.path)
    if record is None:
        return None
    objective = record.objective or study.main_metrics[0]
    if objective not in study.metrics:
        raise UserError(
            f"{study.path / ABLATION_RECORD} ranks by {objective}, which no run recorded: "
            f"there are {', '.join(study.metrics)}"
        )
    return Ablation(**{**vars(record), "objective": objective}, study=study)


def level_text(value: Any) -> str:
    """A level as it stands in labels; "" as two quotation marks."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(level_text, value))
    return str(value) or '""'


def num_runs(ablation: Ablation) -> tuple[int, int]:
    """Runs of the ablation that are over, and how many there are in all as far as its trials are known."""
    cells = {ablation.control, *(trial.cell for trial in ablation.trials)}
    over = ("finished", "diverged", "pruned")
    runs = [run for run in ablation.study.runs if run.cell in cells and run.seed in ablation.seeds]
    return sum(run.status in over for run in runs), len(cells) * len(ablation.seeds)


def duplicates(trials: Iterable[Trial]) -> list[Trial]:
    """Trials whose setting an earlier one had."""
    seen: set[str] = set()
    found = []
    for trial in trials:
        if trial.cell in seen:
            found.append(trial)
        seen.add(trial.cell)
    return found
