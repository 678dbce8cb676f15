"""The record of an ablation, `ablation.json`, as objects: its methods with their axes, and its trials."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.records.schema import (
    AblationKind,
    AblationRecord,
    AxisKind,
    AxisRecord,
    Pruner,
    SubjectRecord,
    TrialRecord,
    TrialState,
    read_record,
)

ABLATION_RECORD = "ablation.json"
"""In the folder of a study that is an ablation: all that is known of it besides its runs."""

OVER: tuple[TrialState, ...] = ("complete", "pruned", "diverged")
"""States of a trial that no worker goes on with."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A field of a method's section that varies. Its name is the field's, in a sum `part.field`."""

    name: str
    default: Any
    """Resolved for the backbone."""
    levels: tuple[Any, ...]
    """A grid's as asked, resolved and each once; a search's are the choices of the space."""
    kind: AxisKind
    choices: tuple[Any, ...] = ()
    """All values that a bool or a choice may have."""

    @property
    def is_numeric(self) -> bool:
        return self.kind in ("int", "float")

    @property
    def all_levels(self) -> tuple[Any, ...]:
        """All levels with the default: numbers in their order, others as asked for, the default first if it is new."""
        levels = self.levels if self.default in self.levels else (self.default, *self.levels)
        return tuple(sorted(levels)) if self.is_numeric else levels


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A method whose settings are tried."""

    method: str
    default_cell: str
    axes: tuple[Axis, ...]

    @property
    def default(self) -> dict[str, Any]:
        """The setting whose cell is the default's."""
        return {axis.name: axis.default for axis in self.axes}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting of a method."""

    method: str
    number: int
    """From 0, within the method."""
    cell: str
    setting: Mapping[str, Any]
    """By axis, every axis of the method."""
    state: TrialState
    spent: float
    """Share of the whole budget of its runs that they spent."""
    workers: tuple[str, ...]
    """Processes that worked on it, as host:pid."""

    @property
    def is_over(self) -> bool:
        return self.state in OVER


@dataclass(frozen=True, kw_only=True)
class RecordedAblation:
    """What was asked for, and how it stands."""

    kind: AblationKind
    objective: str
    """Name of the metric that trials are ranked by; "" until the first evaluation."""
    seeds: tuple[int, ...]
    control: str
    """Label of the control's cell."""
    num_asked: int
    """Trials a method of a search; 0 for grids, which hold all of theirs from the start."""
    pruner: Pruner
    depth: int
    """Blocks of the backbone."""
    subjects: tuple[Subject, ...]
    trials: tuple[Trial, ...]
    """By method and number."""

    @property
    def is_search(self) -> bool:
        return self.kind == "search"

    def of(self, subject: Subject) -> tuple[Trial, ...]:
        """A method's trials, in the order of their numbers."""
        return tuple(trial for trial in self.trials if trial.method == subject.method)

    def find(self, subject: Subject, setting: Mapping[str, Any]) -> Trial | None:
        """The first trial of a setting."""
        return next((trial for trial in self.of(subject) if trial.setting == setting), None)


def read_ablation(study: Path) -> RecordedAblation | None:
    """The ablation of a study's folder; None where it is none. `UserError` names what is wrong with its record."""
    path = study / ABLATION_RECORD
    if not path.is_file():
        return None
    record = read_record(path, AblationRecord, "give the command that made the study again")
    return RecordedAblation(
        kind=record["kind"],
        objective=record["objective"],
        seeds=tuple(record["seeds"]),
        control=record["control"],
        num_asked=record["trials"],
        pruner=record["pruner"],
        depth=record["model"]["depth"],
        subjects=tuple(_subject(name, facts) for name, facts in record["methods"].items()),
        trials=tuple(sorted(map(_trial, record["trial_list"]), key=lambda trial: (trial.method, trial.number))),
    )


def _subject(method: str, facts: SubjectRecord) -> Subject:
    return Subject(method=method, default_cell=facts["default_cell"], axes=tuple(map(read_axis, facts["axes"])))


def read_axis(record: AxisRecord) -> Axis:
    """An axis as it stands on record."""
    return Axis(
        name=record["name"],
        default=_fixed(record["default"]),
        levels=_all_fixed(record["levels"]),
        kind=record["kind"],
        choices=_all_fixed(record.get("choices", [])),
    )


def _trial(line: TrialRecord) -> Trial:
    return Trial(
        method=line["method"],
        number=line["number"],
        cell=line["cell"],
        setting={name: _fixed(value) for name, value in line["setting"].items()},
        state=line["state"],
        spent=line["spent"]["budget"],
        workers=tuple(line["workers"]),
    )


def _all_fixed(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(map(_fixed, values))


def _fixed(value: Any) -> Any:
    """A level as something that can stand in a set: lists as tuples."""
    return _all_fixed(value) if isinstance(value, list) else value
