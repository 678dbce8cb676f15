"""MLflow rebuilt from the records, which are the source of truth: one MLflow run a cell and seed, each point once.

Doing it again changes nothing. MLflow cannot remove a single point, so a run that holds one that the records do not
have, or have with another value, or holds it twice, is deleted and written anew (`mlflow runs restore` brings the
deleted one back).
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.config import OutputConfig
from harness.records.ablation import ABLATION_RECORD
from harness.records.run_folder import RunFolder, seed_of
from harness.tracking.live import (
    CONFIG_FILE,
    PARENT_TAG,
    STATUS_TAG,
    THEIR_STATUS,
    config_text,
    history,
    metrics_of,
    offset_ms,
    parent_run,
    prepare_store,
    send,
    set_status,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

Key = tuple[str, int]
"""Metric and step of a point."""


@dataclass(frozen=True)
class Mirrored:
    """A run as it stands in MLflow; `run_id` is empty where there is none yet."""

    run_id: str
    points: int
    action: Literal["added", "rebuilt", "unchanged"]
    """`added`: something was missing; `rebuilt`: points disagreed with the records."""


class Mirror:
    """The experiment of a study, found by the name of its folder: studies that share a server need different ones.

    Raises:
        MlflowException, SQLAlchemyError, OSError: from every method, for a store that cannot be reached or written.
    """

    def __init__(self, output: OutputConfig, study: str) -> None:
        """Open the experiment; made if need be, restored if it was deleted."""
        from mlflow import MlflowClient

        prepare_store(output, study)
        self._client = MlflowClient(tracking_uri(output))
        experiment = self._client.get_experiment_by_name(study)
        assert experiment is not None
        self._experiment: str = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(self._experiment)

    def update(self, folder: RunFolder, in_progress: bool = False) -> Mirrored:
        """Make MLflow agree with a run's records.

        A run in progress is neither rebuilt nor ended, as its own process writes to it: it is given what it lacks.
        What that process sends later is the same to the millisecond, so it stays single.
        """
        manifest, wanted = folder.manifest(), recorded_points(folder)
        tags = {**place_of(folder), "method": manifest["method"], **self._parent(folder)}
        found = self._runs_of(tags, manifest.get("mlflow_run", ""))
        if in_progress and not (found or wanted):
            return Mirrored("", 0, "unchanged")  # its process is about to start the run in MLflow
        held = self._values(found[0]) if found else {}
        rebuilt = bool(found) and not in_progress and not agree(held, wanted)
        superfluous = [] if in_progress else found[0 if rebuilt else 1 :]
        for run in superfluous:
            self._client.delete_run(run.info.run_id)
        if rebuilt or not found:
            run, held = self._create(tags, manifest.get("started", "")), {}
        else:
            run = found[0]
        end_ms = run.info.start_time + max((time for _, time in wanted.values()), default=0)
        changes = (
            bool(superfluous),
            self._add_points(run, {key: point for key, point in wanted.items() if key not in held}),
            self._add_files(run, folder, manifest),
            self._set_facts(run, tags, status_of(manifest, in_progress), end_ms),
        )
        action: Any = "rebuilt" if rebuilt else "added" if any(changes) else "unchanged"
        return Mirrored(run.info.run_id, len(wanted), action)

    def _parent(self, folder: RunFolder) -> dict[str, str]:
        """The tag of a child run, where the study is an ablation; its parent is made if need be."""
        study = folder.path.absolute().parents[1]
        if not (study / ABLATION_RECORD).exists():
            return {}
        run_id = parent_run(self._client, study.name)
        if STATUS_TAG not in self._client.get_run(run_id).data.tags:  # just made, and no command is at it
            set_status(self._client, run_id, "finished")
        return {PARENT_TAG: run_id}

    def _runs_of(self, tags: Mapping[str, str], named: str) -> "list[Run]":
        """Runs with the study, cell and seed of these tags; that of the id `named` comes first."""
        runs = [run for run in self._runs() if all(run.data.tags.get(name) == tags[name] for name in PLACE)]
        return sorted(runs, key=lambda run: run.info.run_id != named)

    def _runs(self) -> "Iterator[Run]":
        token = None
        while True:
            page = self._client.search_runs([self._experiment], page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _values(self, run: "Run") -> dict[Key, list[float]]:
        """Every value that MLflow holds for a point."""
        values: dict[Key, list[float]] = {}
        for point in history(self._client, run.info.run_id, run.data.metrics):
            values.setdefault((point.key, point.step), []).append(point.value)
        return values

    def _create(self, tags: Mapping[str, str], started: str) -> "Run":
        """An empty run that began when the recorded one did (ISO time), or now when that is not on record."""
        start_ms = round(1000 * datetime.fromisoformat(started).timestamp()) if started else None
        return self._client.create_run(self._experiment, start_ms, dict(tags), run_name(tags))

    def _add_points(self, run: "Run", points: Mapping[Key, tuple[float, int]]) -> bool:
        from mlflow.entities import Metric

        start_ms = run.info.start_time
        metrics = [Metric(key, value, start_ms + time, step) for (key, step), (value, time) in points.items()]
        send(self._client, run.info.run_id, metrics)
        return bool(metrics)

    def _add_files(self, run: "Run", folder: RunFolder, manifest: Mapping[str, Any]) -> bool:
        """Config and sample pictures; a file of another size was cut short and is sent again."""
        run_id, text = run.info.run_id, config_text(manifest["config"])
        listed = [*self._client.list_artifacts(run_id), *self._client.list_artifacts(run_id, folder.samples.name)]
        sizes = {file.path: file.file_size for file in listed}
        missing = [p for p in pictures(folder) if sizes.get(f"{folder.samples.name}/{p.name}") != p.stat().st_size]
        for path in missing:
            self._client.log_artifact(run_id, str(path), folder.samples.name)
        has_config = sizes.get(CONFIG_FILE) == len(text.encode())
        if not has_config:
            self._client.log_text(run_id, text, CONFIG_FILE)
        return bool(missing) or not has_config

    def _set_facts(self, run: "Run", tags: Mapping[str, str], status: str, end_ms: int) -> bool:
        """Name, tags and status."""
        run_id, name = run.info.run_id, run_name(tags)
        wrong = {key: value for key, value in tags.items() if run.data.tags.get(key) != value}
        for key, value in wrong.items():
            self._client.set_tag(run_id, key, value)
        renamed = run.info.run_name != name
        if renamed:
            self._client.update_run(run_id, name=name)
        ours, theirs = run.data.tags.get(STATUS_TAG), run.info.status
        moved = (ours, theirs) != (status, THEIR_STATUS.get(status, "KILLED"))
        if moved:
            set_status(self._client, run_id, status, end_ms)
        return bool(wrong) or renamed or moved


PLACE = ("study", "cell", "seed")
"""Tags that tell runs apart."""


def place_of(folder: RunFolder) -> dict[str, str]:
    """Study, cell and seed of a run by its folder, which a manifest that was copied or renamed does not know."""
    path = folder.path.absolute()
    return dict(zip(PLACE, (path.parents[1].name, path.parent.name, str(seed_of(folder))), strict=True))


def run_name(tags: Mapping[str, str]) -> str:
    """The name of a cell's run at a seed."""
    return f"{tags['cell']}/seed{tags['seed']}"


def status_of(manifest: Mapping[str, Any], in_progress: bool) -> str:
    """The recorded status; a run that counts as running without being in progress was interrupted."""
    status: str = manifest["status"]
    return "interrupted" if status == "running" and not in_progress else status


def recorded_points(folder: RunFolder) -> dict[Key, tuple[float, int]]:
    """Value, and milliseconds since the start, of every recorded point.

    The clocks stand in both lines of a step that was evaluated: the train line's count, as it is logged first.
    """
    points: dict[Key, tuple[float, int]] = {}
    for name, record in folder.all_lines():
        for key, value in metrics_of(record, name).items():
            points.setdefault((key, record["step"]), (value, offset_ms(record)))
    return points


def agree(held: Mapping[Key, list[float]], wanted: Mapping[Key, tuple[float, int]]) -> bool:
    """Whether every point that MLflow holds is recorded, with that value, and held once."""
    return all(
        key in wanted and len(values) == 1 and stored(values[0]) == stored(wanted[key][0])
        for key, values in held.items()
    )


def stored(value: float) -> float | str:
    """A value as databases keep it: infinities become the largest number; NaN equals itself."""
    return "nan" if math.isnan(value) else max(-sys.float_info.max, min(sys.float_info.max, value))


def pictures(folder: RunFolder) -> list[Path]:
    """Sample pictures that the records name, as far as they are there."""
    lines = [*folder.lines("eval"), *folder.lines("final")]
    named = [folder.path / line["samples"] for line in lines if line.get("samples")]
    return [path for path in named if path.is_file()]
