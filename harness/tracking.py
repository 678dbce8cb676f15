"""MLflow, a live view of the records: written in batches, never able to stop a run."""

import contextlib
import fcntl
import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.config import OutputConfig

BATCH = 900
"""Metrics sent in one call; MLflow takes at most 1000."""


def tracking_uri(output: OutputConfig) -> str:
    """The configured URI, else an SQLite file in the folder of studies (an absolute path, as MLflow needs)."""
    return output.mlflow_uri or f"sqlite:///{Path(output.runs).resolve() / 'mlflow.db'}"


def prepare_store(output: OutputConfig, study: str) -> None:
    """Create the database and the study's experiment once, under a lock: a cold store breaks under several writers."""
    from mlflow import MlflowClient

    root = Path(output.runs).resolve()
    root.mkdir(parents=True, exist_ok=True)
    with quiet(), (root / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri(output))
        if client.get_experiment_by_name(study) is None:
            client.create_experiment(study, artifact_location=(root / "mlartifacts" / study).as_uri())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the database migrations of MLflow's first use from filling the terminal."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Tracker:
    """One run in MLflow. The first failure turns it off and is kept in `failure`; records are not affected."""

    def __init__(self, output: OutputConfig, study: str, name: str, tags: Mapping[str, str], run_id: str) -> None:
        """Start a run, or continue `run_id` when it is not empty."""
        self.run_id, self.failure = run_id, ""
        self._pending: list[Any] = []
        self._logged: set[tuple[str, int]] = set()
        self._on = output.mlflow
        if self._on:
            with self._guarded():
                self._start(output, study, name, tags)

    def _start(self, output: OutputConfig, study: str, name: str, tags: Mapping[str, str]) -> None:
        from mlflow import MlflowClient

        prepare_store(output, study)
        self._client = MlflowClient(tracking_uri(output))
        if self.run_id:
            self._client.update_run(self.run_id, status="RUNNING")
            self._logged = self._points()
        else:
            experiment = self._client.get_experiment_by_name(study)
            assert experiment is not None
            created = self._client.create_run(experiment.experiment_id, run_name=name, tags=dict(tags))
            self.run_id = created.info.run_id

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """An error of MLflow within the block turns tracking off instead of stopping the run."""
        try:
            with quiet():
                yield
        except Exception as error:  # MLflow raises what its database or its server raises
            reason = str(error).partition("\n")[0][:200]
            self._on, self.failure = False, f"{type(error).__name__}: {reason}"

    def _points(self) -> set[tuple[str, int]]:
        """Points that MLflow holds already, so that a continued run writes none twice."""
        keys = self._client.get_run(self.run_id).data.metrics
        return {(m.key, m.step) for key in keys for m in self._client.get_metric_history(self.run_id, key)}

    def log(self, record: Mapping[str, Any]) -> None:
        """Queue the numbers of a train or eval record; sent when enough are waiting, or by `flush`."""
        if not self._on:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for key, value in metrics_of(record).items():
            if (key, record["step"]) not in self._logged:
                self._logged.add((key, record["step"]))
                self._pending.append(Metric(key, value, now, record["step"]))
        if len(self._pending) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Send what is waiting."""
        if not self._on:
            return
        pending, self._pending = self._pending, []
        with self._guarded():
            for start in range(0, len(pending), BATCH):
                self._client.log_batch(self.run_id, metrics=pending[start : start + BATCH])

    def artifact(self, path: Path, folder: str = "") -> None:
        """Attach a file."""
        if self._on:
            with self._guarded():
                self._client.log_artifact(self.run_id, str(path), folder or None)

    def finish(self, status: str) -> None:
        """Send what is waiting and close the run with a status of ours."""
        self.flush()
        if self._on:
            with self._guarded():
                self._client.set_tag(self.run_id, "ditbench.status", status)
                known = {"finished": "FINISHED", "diverged": "FINISHED", "failed": "FAILED"}
                self._client.set_terminated(self.run_id, known.get(status, "KILLED"))


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a record under a flat key that MLflow accepts: terms/repa/value, metrics/fd_..., loss."""
    flat: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}/{key}" if prefix else str(key), inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[re.sub(r"[^\w\-./ ]", "_", prefix)] = float(value)

    walk("", {key: value for key, value in record.items() if key != "step"})
    return flat
