"""What an ablation writes down of its trials."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial

from harness.errors import UserError
from harness.records.files import number
from harness.records.metrics import main_metric, metric
from harness.records.run_folder import RunFolder
from studies.ablation.plan import PlannedSubject, Setting

OVER = ("complete", "pruned", "diverged")
"""States of trials that need no more runs, unless the study grows."""
CLOCKS = {"steps": "step", "images": "images", "train_gflops": "train_gflops", "seconds": "train_seconds"}
"""Field of a record that counts what a budget is in."""


def study_name(study: str, subject: PlannedSubject) -> str:
    """Optuna's name for the trials of a method."""
    return f"{study}/{subject.method}"


def entries_of(record: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """A method's trials on record, by number."""
    own = [entry for entry in record["trial_list"] if entry["method"] == method]
    return sorted(own, key=lambda entry: entry["number"])


def new_entry(subject: PlannedSubject, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as it stands on record before anything is known of its runs."""
    setting: Setting = {**subject.default(), **trial.user_attrs["setting"]}
    return {
        "method": subject.method,
        "number": trial.number,
        "cell": trial.user_attrs["cell"],
        "setting": setting,
        "state": "waiting",
        "value": None,
        "intermediate": {},
        "started": "",
        "ended": "",
        "workers": [],
        "spent": {"budget": 0.0},
    }


def last_value(folder: RunFolder, record: Mapping[str, Any]) -> float:
    """The objective at the last evaluation point of a run; NaN where it was not reached."""
    lines = [line for line in folder.lines("eval") if line["point"] == record["points"]]
    return number(lines[-1]["metrics"][record["objective"]]) if lines and record["objective"] else math.nan


def full_name(asked: str, names: Sequence[str]) -> str:
    """The metric that a name or a family means among those that were measured; "" means the main one.

    Raises:
        UserError: for one that was not measured.
    """
    if not asked:
        return main_metric(names)
    family = sorted((name for name in names if metric(name).prefix == asked), key=lambda name: (len(name), name))
    found = [asked] if asked in names else family
    if not found:
        raise UserError(f"objective is {asked!r}, which is not measured here: give one of {', '.join(names)}")
    return found[0]


def now() -> str:
    """The time in UTC, as it stands in the record."""
    return datetime.now(UTC).isoformat(timespec="seconds")
