"""What an ablation is: settings of methods, each a cell that runs at every tuning seed, and what is on record of it.

A *setting* gives every axis of a method a value; its cell has one label, whatever asked for it. A study may grow: the
record holds the union of what all its commands asked for, and each command runs what it asks for itself.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import methods
from harness.backbones.sit import parse_name
from harness.config import RunConfig, require
from harness.records.ablation import ABLATION_RECORD, Axis, read_axis
from harness.records.files import digest
from harness.records.schema import FORMAT, AblationKind, AxisRecord, PlanRecord, Pruner, SubjectRecord
from studies.configs.sections import as_plain, nominal_shape, resolve_sections

Setting = Mapping[str, Any]
"""Axis name -> value, for every axis of a subject."""

RECORD = ABLATION_RECORD
"""In a study's folder: all that is known of the ablation besides its runs."""

LONGEST_LABEL = 180
"""Bytes. A label names a folder and a lock file."""


@dataclass(frozen=True, kw_only=True)
class PlannedSubject:
    """A method whose settings are tried."""

    method: str
    base: RunConfig
    """The default cell, labelled as the method, at seed 0 and with resolved sections."""
    axes: tuple[Axis, ...]
    """In the order of the fields of the method's section or sections."""
    space: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """The search space that the method declares: axis name -> choices."""

    def default(self) -> Setting:
        """The setting of the default cell."""
        return {axis.name: axis.default for axis in self.axes}

    def cell(self, setting: Setting) -> RunConfig:
        """The cell of a setting, at seed 0 and resolved; axes that the setting leaves out keep their default.

        Raises:
            UserError: for values that the method or the backbone refuses.
        """
        changed: dict[str, dict[str, Any]] = {}
        for name, value in setting.items():
            part, key = axis_field(self.method, name)
            changed.setdefault(part, {})[key] = value
        # All fields of a section at once: between two of them it may be one that the method refuses.
        sections = {part: replace(own, **changed.get(part, {})) for part, own in self.base.sections.items()}
        config = replace(self.base, sections=sections)
        config = resolve_sections(config, nominal_shape(config))
        return replace(config, cell=self.label(self.setting_of(config)))

    def setting_of(self, cell: RunConfig) -> Setting:
        """The values of the axes in a cell."""
        values = {}
        for axis in self.axes:
            part, key = axis_field(self.method, axis.name)
            values[axis.name] = getattr(cell.sections[part], key)
        return values

    def label(self, setting: Setting) -> str:
        """`method,field=value,...`, with the axes alone that are not at their default."""
        away = [f"{axis.name}={text_of(setting[axis.name])}" for axis in self.axes if not is_default(axis, setting)]
        label = ",".join([self.method, *away])
        if len(label.encode()) <= LONGEST_LABEL:
            return label
        return f"{label.encode()[: LONGEST_LABEL - 9].decode(errors='ignore')}~{digest(label)[:8]}"


def axis_name(method: str, part: str, field_name: str) -> str:
    """The name of the axis over a field: the field's own, in a sum `part.field`."""
    return field_name if part == method else f"{part}.{field_name}"


def axis_field(method: str, axis: str) -> tuple[str, str]:
    """The part and the field that an axis of a method varies: what `axis_name` was made of."""
    part, dot, field_name = axis.rpartition(".")
    return (part, field_name) if dot else (method, field_name)


def is_default(axis: Axis, setting: Setting) -> bool:
    """Whether a setting leaves an axis at its default."""
    return bool(setting[axis.name] == axis.default)


def text_of(value: Any) -> str:
    """A value as it stands in a label; text that can stand in no folder's name keeps a digest of itself."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).replace(",", "+")
    safe = re.sub(r"[^\w.+-]", "_", text)
    return safe if safe == text and text else f"{safe}~{digest(value)[:8]}"


@dataclass(frozen=True, kw_only=True)
class AblationPlan:
    """What one command asks for: every setting, and the control, at every seed."""

    kind: AblationKind
    subjects: tuple[PlannedSubject, ...]
    """One of a grid; those of a search share its number of trials."""
    seeds: tuple[int, ...]
    control: RunConfig
    settings: tuple[Setting, ...] = ()
    """The settings of a grid, each once, the default first."""
    trials: int = 0
    """Number of trials of each method in a search."""
    pruner: Pruner = "none"
    objective: str = ""
    """A metric's full name or its family; "" = the main metric."""
    storage: str = ""
    """URL of a database; "" = a journal in the study's folder."""
    workers: int = 0
    """Runs side by side; 0 = as many as the machine has places for."""

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.control.output.runs) / self.control.study


# -- the record -----------------------------------------------------------------------------------------------------


def plan_record(ablation: AblationPlan) -> PlanRecord:
    """The part of the record that is known before any trial, as plain values."""
    control = ablation.control
    is_search = ablation.kind == "search"
    return {
        "format": FORMAT,
        "study": control.study,
        "kind": ablation.kind,
        "objective": "",
        "objective_asked": ablation.objective,
        "seeds": list(ablation.seeds),
        "control": control.label,
        "trials": ablation.trials,
        "sampler": {"name": "tpe", "seed": 0} if is_search else {},
        "pruner": ablation.pruner,
        "storage": re.split(r"[:+]", ablation.storage)[0] or "journal",
        "workers": ablation.workers,
        "budget": {"unit": control.budget.unit, "amount": control.budget.amount},
        "points": control.evaluation.points,
        "model": {"name": control.model.name, "depth": parse_name(control.model.name)["depth"]},
        "base": {key: value for key, value in as_plain(control).items() if key not in RUN_FIELDS},
        "methods": {subject.method: _subject_record(subject) for subject in ablation.subjects},
    }


RUN_FIELDS = ("study", "cell", "method", "seed", "sections")
"""Fields of a run's config that its cell and seed decide; the rest is shared by all cells."""


def _subject_record(subject: PlannedSubject) -> SubjectRecord:
    sections = {part: dataclasses.asdict(section) for part, section in subject.base.sections.items()}
    return {
        "default_cell": subject.base.label,
        # Of a sum the record holds all sections by part, of a single method its section itself.
        "section": sections.get(subject.method, sections),
        "space": {name: list(choices) for name, choices in subject.space.items()},
        "axes": [_axis_record(axis) for axis in subject.axes],
    }


def _axis_record(axis: Axis) -> AxisRecord:
    return {
        "name": axis.name,
        "default": axis.default,
        "levels": list(axis.levels),
        "kind": axis.kind,
        "choices": list(axis.choices),
    }


def recorded_sections(method: str, entry: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The sections of a method's parts, by part, from what the record holds of the method."""
    section: Mapping[str, Any] = entry["section"]
    return section if len(methods.parts(method)) > 1 else {method: section}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a study may not change, each as `key before, now after`, the most telling first.

    Args:
        before: the study's record.
        now: what `plan_record` says of this command.
    """
    changed = [
        *_changed("data.name", before["base"]["data"]["name"], now["base"]["data"]["name"]),
        *_changed("method", "+".join(sorted(before["methods"])), "+".join(sorted(now["methods"]))),
        *_changed("kind", before["kind"], now["kind"]),
    ]
    # After another data set or method, all else differs as a consequence.
    if not changed:
        changed = [*_base_changes(before, now), *_method_changes(before, now), *_search_changes(before, now)]
    changed += _changed("storage", before["storage"], now["storage"])
    return changed


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, but for those that a continued run may change as well."""
    # Loads what trains; a command that only looks at a plan does without.
    from studies.configs.differences import differing

    return differing(before, now)


def _base_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = _differing(before["base"], now["base"])
    # Studies of 0.1.0 have `auto` here, which is no value any more. What it came to stands in the manifests of
    # their runs and is compared when these go on.
    return [f"{key} {old!r}, now {new!r}" for key, old, new in changed if (key, old) != ("runtime.compile", "auto")]


def _method_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for method, entry in before["methods"].items():
        sections = (recorded_sections(method, each) for each in (entry, now["methods"][method]))
        found += [f"{key} {old!r}, now {new!r}" for key, old, new in _differing(*sections)]
    return found


def _search_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a search may not change. A grid may: its trials do not depend on one another."""
    found = _changed("objective", before["objective_asked"] or "main", now["objective_asked"] or "main")
    if now["kind"] != "search":
        return found
    for method, entry in before["methods"].items():
        spaces = _differing(entry["space"], now["methods"][method]["space"])
        found += [f"search space of {method}, {key}: {old}, now {new}" for key, old, new in spaces]
    found += _changed("seeds", before["seeds"], now["seeds"])
    found += _changed("pruner", before["pruner"], now["pruner"])
    return found


def _changed(name: str, before: Any, now: Any) -> list[str]:
    return [f"{name} {before!r}, now {now!r}"] if digest(before) != digest(now) else []


SHOWN = 3
"""Differences that a refusal names."""


def refusal(folder: Path, lines: Sequence[str]) -> str:
    """Why a command may not go on with a study that differs in these lines."""
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"{folder} holds another ablation: {'; '.join(lines[:SHOWN])}{more}: give another --study"


def refuse_other_study(folder: Path) -> None:
    """Raise `UserError` when a study's folder holds runs that belong to no ablation."""
    # In this order: a command that has just begun the ablation writes the record before the first run.
    has_runs = any(folder.glob("*/seed*/manifest.json"))
    require(not has_runs or (folder / RECORD).exists(), f"{folder} holds runs of no ablation: give another --study")


# -- growth ---------------------------------------------------------------------------------------------------------


def joined(ablation: AblationPlan, before: Mapping[str, Any]) -> AblationPlan:
    """The ablation with the axes and levels that the study's record has beyond its own.

    It has no more settings than before, but each of them gives every axis of the study a value.
    """
    subjects = tuple(
        replace(subject, axes=_join_axes(subject, before["methods"][subject.method]["axes"]))
        for subject in ablation.subjects
    )
    settings = tuple({**subjects[0].default(), **setting} for setting in ablation.settings)
    return replace(ablation, subjects=subjects, settings=settings)


def _join_axes(subject: PlannedSubject, recorded: Sequence[AxisRecord]) -> tuple[Axis, ...]:
    """The axes of both, in the order of the fields of the sections."""
    known = {axis.name: axis for axis in subject.axes}
    for before in map(read_axis, recorded):
        own = known.get(before.name)
        known[before.name] = replace(before, levels=_join_levels(before.levels, own.levels if own else ()))
    order = [
        axis_name(subject.method, part, item.name)
        for part, section in subject.base.sections.items()
        for item in dataclasses.fields(section)
    ]
    return tuple(sorted(known.values(), key=lambda axis: order.index(axis.name)))


def _join_levels(before: Sequence[Any], now: Sequence[Any]) -> tuple[Any, ...]:
    """The levels of both, each once; numbers in ascending order."""
    levels = list(dict.fromkeys((*before, *now)))
    numbers = all(isinstance(level, int | float) and not isinstance(level, bool) for level in levels)
    return tuple(sorted(levels) if numbers else levels)


def grown(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a study after a command whose plan, of a `joined` ablation, is `now`: the union of both."""
    axes = {
        method: {axis["name"]: axis["default"] for axis in entry["axes"]} for method, entry in now["methods"].items()
    }
    trials = [{**trial, "setting": {**axes[trial["method"]], **trial["setting"]}} for trial in before["trial_list"]]
    return {
        **before,
        **now,
        "objective": before["objective"],
        "seeds": list(dict.fromkeys((*before["seeds"], *now["seeds"]))),
        "trials": max(before["trials"], now["trials"]),
        "trial_list": trials,
    }
