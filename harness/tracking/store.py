"""MLflow's store: where it is, how it is made, and calls to it that may fail or hang without doing harm."""

import contextlib
import logging
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness.config import OutputConfig
from harness.records.locks import take

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

PATIENCE_S = 60.0
"""The seconds that all slow calls of a run may take together; then tracking is off for the rest of the run."""
QUICK_S = 1.0
"""A call up to this long is the usual price of tracking, and does not count as slow."""
PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow knows a child run."""
ROLE_TAG = "ditbench.role"
"""The tag that says `study` for the parent of a study's runs."""
STATUS_TAG = "ditbench.status"
"""The tag that holds our status, as MLflow knows no diverged or pruned run."""
THEIR_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
"""MLflow's status for each of ours."""


def tracking_uri(output: OutputConfig) -> str:
    """The configured URI, else an SQLite file in the folder of studies (an absolute path, as MLflow needs)."""
    return output.mlflow_uri or f"sqlite:///{Path(output.runs).resolve() / 'mlflow.db'}"


@dataclass(frozen=True)
class Experiment:
    """The experiment of a study, found by the study's name; studies that share a server need different ones."""

    client: "MlflowClient"
    id: str


def open_experiment(output: OutputConfig, study: str) -> Experiment:
    """The study's experiment, made if need be, or restored if it was deleted; the database is made with it.

    Both are made under a lock, as a cold store breaks under several writers. Artifacts lie beside the runs; a server
    keeps them where it was told to.
    """
    from mlflow import MlflowClient

    root, uri = Path(output.runs).resolve(), tracking_uri(output)
    root.mkdir(parents=True, exist_ok=True)
    with quiet(), take(root / ".mlflow.lock"):
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(study)
        if found is None:
            artifacts = None if uri.startswith("http") else (root / "mlartifacts" / study).as_uri()
            return Experiment(client, client.create_experiment(study, artifact_location=artifacts))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
    return Experiment(client, found.experiment_id)


def set_status(client: "MlflowClient", run_id: str, status: str, end_ms: int | None = None) -> None:
    """Write a status of ours, and MLflow's for it, at `end_ms` (now by default) unless the run is going on."""
    client.set_tag(run_id, STATUS_TAG, status)
    if status == "running":
        client.update_run(run_id, status=THEIR_STATUS[status])
    else:
        client.set_terminated(run_id, THEIR_STATUS[status], end_ms)


def parent_run(experiment: Experiment, study: str) -> str:
    """The id of the run of a whole study, to which its runs are children; it is found by its tag, or made."""
    client = experiment.client
    found = client.search_runs([experiment.id], filter_string=f"tags.`{ROLE_TAG}` = 'study'", max_results=1)
    if found:
        return found[0].info.run_id
    return client.create_run(experiment.id, run_name=study, tags={"study": study, ROLE_TAG: "study"}).info.run_id


# -- calls that may fail or hang ------------------------------------------------------------------------------------


def open_parent(output: OutputConfig, study: str) -> str:
    """The parent run of a study, made once and later opened again; "" where MLflow is off or away. Never raises."""
    if not output.mlflow:
        return ""

    def work() -> str:
        experiment = open_experiment(output, study)
        run_id = parent_run(experiment, study)
        set_status(experiment.client, run_id, "running")
        return run_id

    return Patience().run(work) or ""


def mark(output: OutputConfig, run_id: str, status: str) -> str:
    """Close a run whose own process could not, such as one that failed or was killed, with a status of ours.

    For the parent that records the failure: `mark(config.output, manifest["mlflow_run"], "failed")`. Does nothing for
    an empty `run_id` or with tracking off. Never raises; returns what went wrong, or "".
    """
    if not (output.mlflow and run_id):
        return ""
    from mlflow import MlflowClient

    patience = Patience()
    patience.run(lambda: set_status(MlflowClient(tracking_uri(output)), run_id, status))
    return patience.failure


class Patience:
    """Runs calls to MLflow until one fails or their time is up; the reason is kept in `failure`, and nothing raises.

    Calls up to `QUICK_S` are free; what slower ones take beyond it adds up to at most `PATIENCE_S`, so a store that is
    dead, locked or hanging costs a run that much once, not at every call.
    """

    def __init__(self) -> None:
        self.failure = ""
        self._left = PATIENCE_S

    def run(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where it fails, takes too long, or comes after such a call."""
        if self.failure:
            return None
        import mlflow  # noqa: F401 -- a matter of seconds, which is not the store's fault

        started = time.monotonic()
        try:
            return attempt(work, self._left + QUICK_S)
        except Exception as error:  # whatever MLflow, its database or its server raises
            self.failure = reason(error)
            return None
        finally:
            self._left -= max(0.0, time.monotonic() - started - QUICK_S)


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
