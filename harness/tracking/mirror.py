"""One run in MLflow as the mirror of a run folder, whose records are the source of truth.

A point lies at the start of its MLflow run plus the seconds that its record counts (training, evaluation, I/O), not at
the time it was sent. So a run that trains and a `ditbench sync` beside it write the same point, and the database keeps
one of them.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.config import OutputConfig
from harness.records.ablation import ABLATION_RECORD
from harness.records.files import number
from harness.records.run_folder import RunFolder, seed_of
from harness.records.schema import RecordName
from harness.tracking.store import (
    PARENT_TAG,
    STATUS_TAG,
    THEIR_STATUS,
    Experiment,
    open_experiment,
    parent_run,
    set_status,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

Records = Sequence[tuple[RecordName, Mapping[str, Any]]]
"""Records with the kind of each."""
Key = tuple[str, int]
"""The metric and the step of a point."""
BATCH = 900
"""The number of points that are sent in one call; MLflow takes at most 1000."""
PLACE = ("study", "cell", "seed")
"""The tags that tell runs apart."""
CONFIG_FILE = "config.json"
"""The artifact that holds a run's resolved config; parameters could not change when a run continues."""


class Mirror:
    """One run in MLflow that is given what it lacks of a run folder, each point once.

    Raises:
        MlflowException, SQLAlchemyError, OSError: from every method, for a store that cannot be reached or written.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, run_id: str = "", parent: str = "") -> None:
        """Open the run `run_id`. Where that is empty, make a run that began when the recorded one did.

        Args:
            parent: the id of the run that it is a child of, or "".
        """
        manifest, self._client, self._folder = folder.manifest(), experiment.client, folder
        self._config, self._tags = manifest["config"], {**place_of(folder), "method": manifest["method"]}
        if parent:
            self._tags[PARENT_TAG] = parent
        if run_id:
            run = self._client.get_run(run_id)
        else:
            tags = {**self._tags, STATUS_TAG: "running"}
            run = self._client.create_run(experiment.id, started_ms(manifest), tags, run_name(folder))
        self.run_id, self.is_changed = run.info.run_id, not run_id
        self._run, self._status, self._last_ms = run, (run.data.tags.get(STATUS_TAG), run.info.status), 0
        self._held: dict[Key, list[float]] = {}
        for metric in run.data.metrics:
            for point in self._client.get_metric_history(self.run_id, metric):
                self._held.setdefault((point.key, point.step), []).append(point.value)
        folders = (None, folder.samples.name) if run_id else ()
        files = [file for path in folders for file in self._client.list_artifacts(self.run_id, path)]
        self._sizes = {file.path: file.file_size for file in files}

    def agrees(self, records: Records) -> bool:
        """Whether every point that MLflow holds is recorded, with that value, and held once."""
        wanted = recorded_points(records)
        return all(
            key in wanted and [stored(value) for value in values] == [stored(wanted[key][0])]
            for key, values in self._held.items()
        )

    def update(self, records: Records) -> None:
        """Send the points and the sample pictures of these records that MLflow lacks.

        A picture of another size was cut short, and is sent again.
        """
        from mlflow.entities import Metric

        start_ms, points = self._run.info.start_time, recorded_points(records)
        lacking = {key: point for key, point in points.items() if key not in self._held}
        metrics = [Metric(key, value, start_ms + time, step) for (key, step), (value, time) in lacking.items()]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])
        self._held |= {key: [value] for key, (value, _) in lacking.items()}
        self._last_ms = max([self._last_ms, *(time for _, time in points.values())])
        pictures = [self._folder.path / record["samples"] for _, record in records if record.get("samples")]
        missing = [path for path in pictures if path.is_file() and not self._has(path)]
        for path in missing:
            self._client.log_artifact(self.run_id, str(path), self._folder.samples.name)
        self.is_changed |= bool(metrics or missing)

    def _has(self, picture: Path) -> bool:
        return self._sizes.get(f"{self._folder.samples.name}/{picture.name}") == picture.stat().st_size

    def begin(self) -> None:
        """Show that a process trains the run, with the config of this process."""
        self._sizes.pop(CONFIG_FILE, None)  # which may be as long as the one that is there
        self.describe()
        self.set_status("running")

    def describe(self) -> None:
        """Set name, tags and config to what is on record."""
        tags, name = self._run.data.tags, run_name(self._folder)
        wrong = {key: value for key, value in self._tags.items() if tags.get(key) != value}
        for key, value in wrong.items():
            self._client.set_tag(self.run_id, key, value)
        if is_renamed := self._run.info.run_name != name:
            self._client.update_run(self.run_id, name=name)
        text = json.dumps(self._config, indent=1, sort_keys=True) + "\n"
        if is_old := self._sizes.get(CONFIG_FILE) != len(text.encode()):
            self._client.log_text(self.run_id, text, CONFIG_FILE)
        self.is_changed |= bool(wrong) or is_renamed or is_old

    def set_status(self, status: str) -> None:
        """Set the status to one of ours; a run that is over ended with its last record."""
        wanted = status, THEIR_STATUS[status]
        if self._status != wanted:
            set_status(self._client, self.run_id, status, self._run.info.start_time + self._last_ms)
            self._status, self.is_changed = wanted, True


# -- all at once ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mirrored:
    """A run as it stands in MLflow; `run_id` is empty where there is none yet."""

    run_id: str
    points: int
    action: Literal["added", "rebuilt", "unchanged"]
    """`added`: something was missing; `rebuilt`: points disagreed with the records."""


def sync(output: OutputConfig, folder: RunFolder, in_progress: bool = False) -> Mirrored:
    """Make MLflow agree with a run's records: one MLflow run, each point once. Doing it again changes nothing.

    MLflow cannot remove a single point, so a run that holds one that the records do not have, or have with another
    value, or holds it twice, is deleted and written anew (`mlflow runs restore` brings the deleted one back).

    A run in progress is neither rebuilt nor ended, as its own process writes to it: it is given what it lacks.
    """
    experiment = open_experiment(output, place_of(folder)["study"])
    manifest, records = folder.manifest(), list(folder.all_lines())
    found = runs_of(experiment, folder, manifest.get("mlflow_run", ""))
    if in_progress and not (found or records):
        return Mirrored("", 0, "unchanged")  # its process is about to start the run in MLflow
    parent = parent_of(experiment, folder)
    mirror = Mirror(experiment, folder, found[0] if found else "", parent)
    is_wrong = not (in_progress or mirror.agrees(records))
    superfluous = [] if in_progress else found[0 if is_wrong else 1 :]
    for run_id in superfluous:
        experiment.client.delete_run(run_id)
    if is_wrong:
        mirror = Mirror(experiment, folder, "", parent)
    mirror.update(records)
    mirror.describe()
    mirror.set_status("interrupted" if manifest["status"] == "running" and not in_progress else manifest["status"])
    action: Any = "rebuilt" if is_wrong else "added" if superfluous or mirror.is_changed else "unchanged"
    return Mirrored(mirror.run_id, len(recorded_points(records)), action)


def runs_of(experiment: Experiment, folder: RunFolder, named: str) -> list[str]:
    """The ids of the MLflow runs with the study, cell and seed of a folder; the id `named` comes first."""
    found: list[Run] = []
    token = ""
    while token is not None:
        page = experiment.client.search_runs([experiment.id], page_token=token or None)
        token = page.token
        found += [run for run in page if place_of(folder).items() <= run.data.tags.items()]
    return sorted((run.info.run_id for run in found), key=lambda run_id: run_id != named)


def parent_of(experiment: Experiment, folder: RunFolder) -> str:
    """The id of the parent run, made if need be, where the study is an ablation; else ""."""
    study = folder.path.absolute().parents[1]
    if not (study / ABLATION_RECORD).exists():
        return ""
    run_id = parent_run(experiment, study.name)
    if STATUS_TAG not in experiment.client.get_run(run_id).data.tags:  # just made, and no command is at it
        set_status(experiment.client, run_id, "finished")
    return run_id


# -- what is shown --------------------------------------------------------------------------------------------------


def place_of(folder: RunFolder) -> dict[str, str]:
    """The study, cell and seed of a run by its folder, which a manifest that was copied or renamed does not know."""
    path = folder.path.absolute()
    return dict(zip(PLACE, (path.parents[1].name, path.parent.name, str(seed_of(folder))), strict=True))


def run_name(folder: RunFolder) -> str:
    """The name of a cell's run at a seed."""
    return f"{folder.path.absolute().parent.name}/{folder.path.name}"


def started_ms(manifest: Mapping[str, Any]) -> int | None:
    """When a run began, in milliseconds since 1970; None, which MLflow takes for now, where that is not on record."""
    started = manifest.get("started")
    return round(1000 * datetime.fromisoformat(started).timestamp()) if started else None


def recorded_points(records: Records) -> dict[Key, tuple[float, int]]:
    """The value, and the milliseconds since the start, of every point of these records.

    The clocks stand in both lines of a step that was evaluated: the train line's count, as it is logged first.
    """
    points: dict[Key, tuple[float, int]] = {}
    for name, record in records:
        for key, value in metrics_of(record, name).items():
            points.setdefault((key, record["step"]), (value, offset_ms(record)))
    return points


def metrics_of(record: Mapping[str, Any], name: RecordName = "train") -> dict[str, float]:
    """Every number of a record under a flat key that MLflow accepts: terms/repa/value, metrics/fd_..., loss.

    Those of the final evaluation stand under `final/`, as they are of another protocol. A record that was read back
    holds non-finite numbers as strings, and gives the same metrics.
    """
    flat: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}/{key}" if prefix else str(key), inner)
        elif (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf"):
            flat[re.sub(r"[^\w\-./ ]", "_", prefix)] = number(value)

    walk("final" if name == "final" else "", {key: value for key, value in record.items() if key != "step"})
    return flat


def offset_ms(record: Mapping[str, Any]) -> int:
    """The milliseconds of training, evaluation and I/O that a run had taken when it wrote a record."""
    return round(1000 * sum(record.get(f"{kind}_seconds", 0.0) for kind in ("train", "evaluation", "io")))


def stored(value: float) -> float | str:
    """A value as databases keep it: infinities become the largest number; NaN equals itself."""
    return "nan" if math.isnan(value) else max(-sys.float_info.max, min(sys.float_info.max, value))
