"""MLflow, a live view of the records: written in batches, never able to stop a run or to hold it up for long.

A point lies at the start of its MLflow run plus the seconds that its record counts (training, evaluation, I/O), not at
the time it was sent. So `harness.tracking.mirror`, which knows the records alone, writes the same point again and the
database keeps one of them.
"""

import contextlib
import fcntl
import json
import logging
import re
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness.config import OutputConfig
from harness.records.files import canonical, number
from harness.records.schema import RecordName

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

T = TypeVar("T")

BATCH = 900
"""Metrics sent in one call; MLflow takes at most 1000."""
PATIENCE_S = 60.0
"""Seconds that all slow calls of a run may take together; then tracking is off for the rest of the run."""
QUICK_S = 1.0
"""A call up to this long is the usual price of tracking, and does not count as slow."""
PARENT_TAG = "mlflow.parentRunId"
"""MLflow's own tag of a child run."""
ROLE_TAG = "ditbench.role"
"""`study` for the parent of a study's runs."""
STATUS_TAG = "ditbench.status"
"""Our status, as MLflow knows no diverged or pruned run."""
THEIR_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
}
"""MLflow's status for each of ours; any other is KILLED."""
CONFIG_FILE = "config.json"
"""The artifact that holds a run's resolved config."""


def tracking_uri(output: OutputConfig) -> str:
    """The configured URI, else an SQLite file in the folder of studies (an absolute path, as MLflow needs)."""
    return output.mlflow_uri or f"sqlite:///{Path(output.runs).resolve() / 'mlflow.db'}"


def prepare_store(output: OutputConfig, study: str) -> None:
    """Create the database and the study's experiment once, under a lock: a cold store breaks under several writers.

    Artifacts lie beside the runs; a server keeps them where it was told to.
    """
    from mlflow import MlflowClient

    root, uri = Path(output.runs).resolve(), tracking_uri(output)
    root.mkdir(parents=True, exist_ok=True)
    with quiet(), (root / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(uri)
        if client.get_experiment_by_name(study) is None:
            artifacts = None if uri.startswith("http") else (root / "mlartifacts" / study).as_uri()
            client.create_experiment(study, artifact_location=artifacts)


# -- calls that may fail or hang ------------------------------------------------------------------------------------


class NoAnswer(Exception):
    """MLflow did not answer in time."""


def attempt(work: Callable[[], T], seconds: float) -> T:
    """What `work` returns or raises, or `NoAnswer` when it takes longer; it is then left to end by itself.

    MLflow's own limits are minutes: ten tries to open a database, 20 s for a locked table, retries of every request.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # MLflow raises what its database or its server raises
            future.set_exception(error)

    with quiet():
        # A daemon, so that a call without an end does not keep the process alive.
        threading.Thread(target=run, name="mlflow", daemon=True).start()
        if not wait([future], seconds).done:
            raise NoAnswer(f"MLflow did not answer within {seconds:.3g} s")
    return future.result()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep migrations, retries and traces of MLflow off the terminal; for good after `NoAnswer`: that call goes on."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow", "urllib3.connectionpool")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except NoAnswer:
        levels = []
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=False):
            logger.setLevel(level)


def reason(error: Exception) -> str:
    """An error in one line, its text cut to 160 characters."""
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {textwrap.shorten(text, 160, placeholder=' …')}"


def mark(output: OutputConfig, run_id: str, status: str) -> str:
    """Close a run whose own process could not, such as one that failed or was killed, with a status of ours.

    For the parent that records the failure: `mark(config.output, manifest["mlflow_run"], "failed")`. Does nothing for
    an empty `run_id` or with tracking off. Never raises, waits at most `PATIENCE_S`; returns what went wrong, or "".
    """
    if not (output.mlflow and run_id):
        return ""
    from mlflow import MlflowClient

    def close() -> None:
        set_status(MlflowClient(tracking_uri(output)), run_id, status)

    try:
        attempt(close, PATIENCE_S)
    except Exception as error:  # as in `Tracker`
        return reason(error)
    return ""


def set_status(client: "MlflowClient", run_id: str, status: str, end_ms: int | None = None) -> None:
    """Write a status of ours, and MLflow's for it, at `end_ms` (now by default) unless the run is going on."""
    client.set_tag(run_id, STATUS_TAG, status)
    theirs = THEIR_STATUS.get(status, "KILLED")
    if theirs == "RUNNING":
        client.update_run(run_id, status=theirs)
    else:
        client.set_terminated(run_id, theirs, end_ms)


def open_parent(output: OutputConfig, study: str) -> str:
    """The run of a whole study, to which its runs are children: made once, later opened again; found by its tag.

    Never raises, waits at most `PATIENCE_S`. Returns "" where MLflow is off or away.
    """
    if not output.mlflow:
        return ""
    from mlflow import MlflowClient

    def work() -> str:
        prepare_store(output, study)
        client = MlflowClient(tracking_uri(output))
        run_id = parent_run(client, study)
        set_status(client, run_id, "running")
        return run_id

    try:
        return attempt(work, PATIENCE_S)
    except Exception:  # as in `Tracker`
        return ""


def parent_run(client: "MlflowClient", study: str) -> str:
    """The id of the parent run of a study, in a prepared store."""
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{ROLE_TAG}` = 'study'", max_results=1)
    if found:
        return found[0].info.run_id
    run = client.create_run(experiment.experiment_id, run_name=study, tags={"study": study, ROLE_TAG: "study"})
    return run.info.run_id


# -- a run, live ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """An open run in MLflow."""

    client: "MlflowClient"
    run_id: str
    start_ms: int
    points: frozenset[tuple[str, int]]
    """Key and step of what it holds already."""


def open_session(output: OutputConfig, study: str, name: str, tags: Mapping[str, str], run_id: str) -> Session:
    """Start a run in a prepared store, or continue `run_id` when it is not empty."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(output))
    if run_id:
        set_status(client, run_id, "running")
        run = client.get_run(run_id)
    else:
        experiment = client.get_experiment_by_name(study)
        assert experiment is not None
        run = client.create_run(experiment.experiment_id, run_name=name, tags=dict(tags))
    points = {(point.key, point.step) for point in history(client, run.info.run_id, run.data.metrics)}
    return Session(client, run.info.run_id, run.info.start_time, frozenset(points))


def history(client: "MlflowClient", run_id: str, keys: Mapping[str, float]) -> "Iterator[Metric]":
    """Every point of a run under these keys."""
    for key in keys:
        yield from client.get_metric_history(run_id, key)


class Tracker:
    """One run in MLflow. The first failure turns it off and is kept in `failure`; records are not affected.

    Calls up to `QUICK_S` are free; what slower ones take beyond it adds up to at most `PATIENCE_S`, so a tracker that
    is dead, locked or hanging costs a run that much once, not at every call.

    A run that was killed after a flush but before the checkpoint makes those steps again, and MLflow keeps the points
    of the first time: values repeat bit for bit on the CPU, but seconds never do, and with CUDA or a budget in seconds
    nothing need. `ditbench sync` puts the recorded ones in their place.
    """

    def __init__(self, output: OutputConfig, study: str, name: str, tags: Mapping[str, str], run_id: str) -> None:
        """Start a run, or continue `run_id` when it is not empty."""
        self.run_id, self.failure = run_id, ""
        self._patience = PATIENCE_S
        self._pending: list[Metric] = []
        self._logged: set[tuple[str, int]] = set()
        self._session: Session | None = None
        if output.mlflow:
            import mlflow  # noqa: F401 -- a matter of seconds, which is not the store's fault

            # Two calls: one that is given up may end later, and should not leave a run in MLflow then.
            self._guarded(lambda: prepare_store(output, study))
            if not self.failure:
                self._session = self._guarded(lambda: open_session(output, study, name, tags, run_id))
        if self._session:
            self.run_id, self._logged = self._session.run_id, set(self._session.points)

    def _guarded(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; an error or a long wait turns tracking off instead of stopping the run."""
        started = time.monotonic()
        try:
            return attempt(work, self._patience + QUICK_S)
        except Exception as error:  # whatever MLflow, its database or its server raises
            self._session, self.failure = None, reason(error)
            return None
        finally:
            self._patience -= max(0.0, time.monotonic() - started - QUICK_S)

    def log(self, record: Mapping[str, Any], name: RecordName = "train") -> None:
        """Queue the numbers of a record of that kind; sent when enough are waiting, or by `flush`."""
        if self._session is None:
            return
        from mlflow.entities import Metric

        time_ms = self._session.start_ms + offset_ms(record)
        for key, value in metrics_of(record, name).items():
            if (key, record["step"]) not in self._logged:
                self._logged.add((key, record["step"]))
                self._pending.append(Metric(key, value, time_ms, record["step"]))
        if len(self._pending) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Send what is waiting."""
        session, pending = self._session, self._pending
        self._pending = []
        if session and pending:
            self._guarded(lambda: send(session.client, session.run_id, pending))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Attach a file."""
        if session := self._session:
            self._guarded(lambda: session.client.log_artifact(session.run_id, str(path), folder or None))

    def config(self, config: Mapping[str, Any]) -> None:
        """Attach the resolved config, as a file: parameters could not change when a run continues."""
        if session := self._session:
            self._guarded(lambda: session.client.log_text(session.run_id, config_text(config), CONFIG_FILE))

    def finish(self, status: str) -> None:
        """Send what is waiting and close the run with a status of ours."""
        self.flush()
        if session := self._session:
            self._guarded(lambda: set_status(session.client, session.run_id, status))


def send(client: "MlflowClient", run_id: str, metrics: "Sequence[Metric]") -> None:
    """Log points, as many at a time as MLflow takes."""
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


# -- what is sent ---------------------------------------------------------------------------------------------------


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
    """Milliseconds of training, evaluation and I/O that a run had taken when it wrote a record."""
    return round(1000 * sum(record.get(f"{kind}_seconds", 0.0) for kind in ("train", "evaluation", "io")))


def config_text(config: Mapping[str, Any]) -> str:
    """A config as text; the same before it is recorded and when it is read back."""
    return json.dumps(json.loads(canonical(config)), indent=1, sort_keys=True) + "\n"
