"""An ablation: its record `ablation.json`, joined with the runs of its study.

A trial is one setting of a method, which is one cell of the study; its runs are that cell at every seed. The control
is a cell too, and no trial. Every value comes from the runs, at the study's last evaluation point; the record says
which trials there are and how each of them stands.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.records.files import read_json
from harness.records.metrics import metric
from harness.records.run_folder import ABLATION_RECORD, FORMAT, UserError
from reports.statistics.intervals import Direction, paired_difference
from reports.study.load import Study
from reports.tables.results import Digits, MetricResult, absences, is_favoured, shared_digits

RECORD = ABLATION_RECORD
"""Name of the record, in the study's folder."""

OVER = ("complete", "pruned", "diverged")
"""States of a trial that no worker goes on with."""


@dataclass(frozen=True)
class Axis:
    """A field of the method's settings that the ablation varies."""

    name: str
    kind: str
    """int, float, bool, choice or text."""
    default: Any
    asked: tuple[Any, ...]
    """Levels as asked for."""

    @property
    def is_numeric(self) -> bool:
        return self.kind in ("int", "float")

    @property
    def levels(self) -> tuple[Any, ...]:
        """All levels with the default: numbers in their order, others as asked for, the default first if it is new."""
        levels = self.asked if self.default in self.asked else (self.default, *self.asked)
        return tuple(sorted(levels)) if self.is_numeric else levels


@dataclass(frozen=True)
class Subject:
    """A method of the ablation."""

    method: str
    default_cell: str
    axes: tuple[Axis, ...]

    @property
    def default(self) -> dict[str, Any]:
        """The setting whose cell is the default's."""
        return {axis.name: axis.default for axis in self.axes}


@dataclass(frozen=True)
class Trial:
    """One setting of a method."""

    method: str
    number: int
    """From 0, within the method."""
    cell: str
    setting: Mapping[str, Any]
    """By axis, every axis of the method."""
    state: str
    """complete, running, waiting, pruned or diverged."""
    spent: float
    """Share of the whole budget of its runs that they spent."""
    workers: tuple[str, ...]
    """Processes that worked on it, as host:pid."""

    @property
    def is_over(self) -> bool:
        return self.state in OVER


@dataclass(frozen=True)
class Ablation:
    """What was asked for, and how it stands."""

    study: Study
    kind: str
    """grid, one_at_a_time or search."""
    objective: str
    """Name of the metric that trials are ranked by."""
    seeds: tuple[int, ...]
    control: str
    """Label of the control's cell."""
    num_asked: int
    """Trials a method of a search; 0 for grids, which hold all of theirs from the start."""
    pruner: str
    depth: int
    """Blocks of the backbone."""
    subjects: tuple[Subject, ...]
    trials: tuple[Trial, ...]

    @property
    def is_search(self) -> bool:
        return self.kind == "search"

    @property
    def direction(self) -> Direction:
        return metric(self.objective).direction

    @property
    def sign(self) -> int:
        """1 where lower values are better, else -1."""
        return 1 if self.direction == "lower" else -1

    def of(self, subject: Subject) -> tuple[Trial, ...]:
        """A method's trials, in the order of their numbers."""
        return tuple(trial for trial in self.trials if trial.method == subject.method)

    def find(self, subject: Subject, setting: Mapping[str, Any]) -> Trial | None:
        """The first trial of a setting."""
        return next((trial for trial in self.of(subject) if trial.setting == setting), None)

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
        UserError: the record is of another format or lacks a field, or its objective was not recorded.
    """
    path = study.path / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f"{path} has format {found} and this version reads {FORMAT}: report with the version that made it"
        )
    try:
        ablation = _ablation(study, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
        raise UserError(f"{path} {what}: give the command that made the study again") from None
    if ablation.objective not in study.metrics:
        raise UserError(
            f"{path} ranks by {ablation.objective}, which no run recorded: there are {', '.join(study.metrics)}"
        )
    return ablation


def _ablation(study: Study, record: Mapping[str, Any]) -> Ablation:
    return Ablation(
        study=study,
        kind=record["kind"],
        objective=record["objective"] or study.main_metrics[0],
        seeds=tuple(record["seeds"]),
        control=record["control"],
        num_asked=record["trials"],
        pruner=record["pruner"],
        depth=record["model"]["depth"],
        subjects=tuple(_subject(name, facts) for name, facts in record["methods"].items()),
        trials=tuple(sorted(map(_trial, record["trial_list"]), key=lambda trial: (trial.method, trial.number))),
    )


def _subject(method: str, facts: Mapping[str, Any]) -> Subject:
    axes = (Axis(a["name"], a["kind"], _fixed(a["default"]), tuple(map(_fixed, a["levels"]))) for a in facts["axes"])
    return Subject(method, facts["default_cell"], tuple(axes))


def _trial(line: Mapping[str, Any]) -> Trial:
    return Trial(
        method=line["method"],
        number=line["number"],
        cell=line["cell"],
        setting={name: _fixed(value) for name, value in line["setting"].items()},
        state=line["state"],
        spent=line["spent"]["budget"],
        workers=tuple(line["workers"]),
    )


def _fixed(value: Any) -> Any:
    """A level as something that can stand in a set: lists as tuples."""
    return tuple(map(_fixed, value)) if isinstance(value, list) else value


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
