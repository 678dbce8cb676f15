"""`compare --tuned STUDY`: the best setting of each method of an ablation, on seeds that it was not chosen on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import methods
from harness.config import require
from harness.records.files import number
from harness.records.schema import AblationRecord, ManifestNotes, TrialRecord, TuningRecord, read_record
from studies.ablation.plan import RECORD, axis_field, recorded_sections
from studies.configs.cells import Comparison, comparison
from studies.configs.settings import was_given


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A study of trials, and the best of each method."""

    folder: Path
    record: AblationRecord
    winners: Mapping[str, TrialRecord]
    """By method."""

    def cells(self) -> dict[str, dict[str, Any]]:
        """The control and the winners, as `compare --cells` takes them."""
        control = {self.record["control"]: {"method": self.record["control"]}}
        return control | {trial["cell"]: self._cell(method, trial) for method, trial in self.winners.items()}

    def _cell(self, method: str, trial: TrialRecord) -> dict[str, Any]:
        sections = recorded_sections(method, self.record["methods"][method])
        changed = {part: dict(fields) for part, fields in sections.items()}
        for axis, value in trial["setting"].items():
            part, key = axis_field(method, axis)
            changed[part][key] = value
        return {"method": method, **changed}

    def notes(self) -> dict[str, ManifestNotes]:
        """What the manifests of a winner's runs say of its tuning, by cell."""
        return {trial["cell"]: {"tuning": self._note(method, trial)} for method, trial in self.winners.items()}

    def _note(self, method: str, trial: TrialRecord) -> TuningRecord:
        return {
            "study": self.record["study"],
            "id": self.record["id"],
            "kind": self.record["kind"],
            "objective": self.record["objective"],
            "seeds": self.record["seeds"],
            "setting": trial["setting"],
            "value": trial["value"],
            "trials": len(trials_of(self.record, method)),
        }


def open_tuning(folder: Path) -> Tuning:
    """The tuning of a study.

    Raises:
        UserError: for a folder without trials, and for one whose best trials are not known yet.
    """
    path = folder / RECORD
    require(path.is_file(), f"--tuned {folder}: there is no {RECORD}; name a study of `ditbench ablate`")
    record = read_record(path, AblationRecord, "give the command that made the study again")
    return Tuning(
        folder=folder, record=record, winners={name: _winner(folder, record, name) for name in record["methods"]}
    )


def trials_of(record: AblationRecord, method: str) -> list[TrialRecord]:
    """The trials of a method."""
    return [trial for trial in record["trial_list"] if trial["method"] == method]


def _winner(folder: Path, record: AblationRecord, method: str) -> TrialRecord:
    """The best completed trial of a method, the first of equals."""
    trials = trials_of(record, method)
    unfinished = sum(trial["state"] in ("waiting", "running") for trial in trials)
    missing = unfinished + max(0, record["trials"] - len(trials))
    require(
        not missing,
        f"--tuned {folder}: unfinished trials of {method}: {missing}, so its best is not known; "
        "run the same `ditbench ablate` again first",
    )
    completed = [trial for trial in trials if trial["state"] == "complete"]
    require(bool(completed), f"--tuned {folder}: no trial of {method} came to its end, so there is no best one")
    sign = 1 if record["direction"] == "lower" else -1
    return min(completed, key=lambda trial: sign * number(trial["value"] if trial["value"] is not None else math.nan))


def set_defaults(parser: ArgumentParser, tuning: Tuning) -> None:
    """Let the shared settings of the study stand wherever the command gives no others."""
    values = dict(_leaves(tuning.record["base"]))
    strange = sorted(values.keys() - {action.dest for action in parser._actions})
    require(
        not strange, f"--tuned {tuning.folder} has {', '.join(strange)} on record, which this version does not know"
    )
    parser.set_defaults(values)
    parser.set_defaults({"output.runs": str(tuning.folder.parent)})


def _leaves(values: Mapping[str, Any], front: str = "") -> Sequence[tuple[str, Any]]:
    """Dotted keys of nested values."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _leaves(value, f"{front}{key}.") if isinstance(value, Mapping) else [(f"{front}{key}", value)]
    return found


def tuned_comparison(parser: ArgumentParser, namespace: Namespace, argv: Sequence[str], tuning: Tuning) -> Comparison:
    """The control and the winners at the seeds that were asked for.

    Raises:
        UserError: for seeds that the winners were chosen on, and for options that would change what was tuned.
    """
    for name in ("methods", "cells"):
        require(not was_given(argv, name), f"--{name} with --tuned: the study says what is compared; leave it out")
    own = next((word for word in argv if word.startswith(tuple(f"--{name}." for name in methods.names()))), "")
    require(not own, f"{own} with --tuned: the study says how its methods are set; leave it out")
    # Studies of 0.1.0 have `auto` on record, and defaults are not checked by the parser.
    require(
        namespace.runtime.compile != "auto",
        f"--tuned {tuning.folder} has runtime.compile auto on record: give --runtime.compile true or false, as its "
        "trials ran",
    )
    used = sorted(set(namespace.seeds) & set(tuning.record["seeds"]))
    require(
        not used,
        f"seeds {_listed(used)} were used for tuning in {tuning.folder}: give others, such as --seeds {_free(tuning)}",
    )
    changed = namespace.clone()
    changed.cells = tuning.cells()
    if not was_given(argv, "study"):
        changed.study = f"{tuning.record['study']}-tuned"
    return replace(comparison(parser, changed), notes=tuning.notes())


def _listed(seeds: Sequence[int]) -> str:
    return ",".join(map(str, seeds))


def _free(tuning: Tuning) -> str:
    """As many seeds as were used, above them."""
    used = tuning.record["seeds"]
    return _listed(range(max(used) + 1, max(used) + 1 + len(used)))
