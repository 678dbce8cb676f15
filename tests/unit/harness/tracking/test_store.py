"""MLflow's store: it may fail or hang without raising, and is made once."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.config import OutputConfig
from harness.tracking import store
from harness.tracking.store import Experiment, Patience, mark, open_experiment, open_parent, tracking_uri


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> OutputConfig:
    """A folder of studies whose name needs care in a URI."""
    return OutputConfig(runs=str(tmp_path_factory.mktemp("store") / "all runs, élan"))


@pytest.fixture(scope="module")
def experiment(output: OutputConfig) -> Experiment:
    return open_experiment(output, "digits")


@pytest.fixture
def under_a_file(tmp_path: Path) -> Iterator[str]:
    """A URI of a database that cannot be made."""
    (tmp_path / "file").touch()
    yield f"sqlite:///{tmp_path}/file/mlflow.db"


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Waiting for it takes until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_the_default_store_is_an_absolute_path_beside_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(OutputConfig(runs="runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri(OutputConfig(mlflow_uri="http://127.0.0.1:5000")) == "http://127.0.0.1:5000"


def test_an_experiment_is_made_once_and_restored(output: OutputConfig, experiment: Experiment) -> None:
    assert open_experiment(output, "digits").id == experiment.id
    assert open_experiment(output, "other").id != experiment.id
    experiment.client.delete_experiment(experiment.id)
    assert open_experiment(output, "digits").id == experiment.id
    assert experiment.client.get_experiment(experiment.id).lifecycle_stage == "active"


# -- hanging --------------------------------------------------------------------------------------------------------


def test_a_call_is_waited_for_or_given_up(never: threading.Event) -> None:
    assert store.attempt(lambda: 3, 10) == 3
    with pytest.raises(ZeroDivisionError):
        store.attempt(lambda: 1 // 0, 10)
    began = time.monotonic()
    with pytest.raises(store.NoAnswer, match=r"within 0\.05 s"):
        store.attempt(never.wait, 0.05)
    assert time.monotonic() - began < 5


def test_mlflow_is_silent_while_it_is_used_and_after_it_was_given_up(never: threading.Event) -> None:
    loggers = [logging.getLogger(name) for name in ("mlflow.store", "alembic.runtime", "urllib3.connectionpool")]
    speaking = [logger.getEffectiveLevel() for logger in loggers]
    assert store.attempt(lambda: [logger.isEnabledFor(logging.ERROR) for logger in loggers], 10) == [False] * 3
    assert [logger.getEffectiveLevel() for logger in loggers] == speaking
    parents = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3.connectionpool")]
    levels = [logger.level for logger in parents]
    try:
        with pytest.raises(store.NoAnswer):
            store.attempt(never.wait, 0.05)
        assert not any(logger.isEnabledFor(logging.ERROR) for logger in loggers)
    finally:
        for logger, level in zip(parents, levels, strict=True):
            logger.setLevel(level)


def test_slow_calls_share_one_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 s of patience, and of a call of 16 s 15 count: for the third of them 11 s are left."""
    clock, limits, durations = [0.0], [], [0.5, 16.0, 0.5, 16.0, 0.5, 16.0]
    monkeypatch.setattr(store, "PATIENCE_S", 40.0)

    def attempt(work: Callable[[], Any], seconds: float) -> Any:
        limits.append(seconds)
        takes = durations.pop(0)
        clock[0] += min(seconds, takes)
        if takes > seconds:
            raise store.NoAnswer(f"MLflow did not answer within {seconds:.0f} s")
        return work()

    monkeypatch.setattr(store, "attempt", attempt)
    monkeypatch.setattr(store.time, "monotonic", lambda: clock[0])
    patience = Patience()
    assert [patience.run(lambda: "done") for _ in range(8)] == ["done"] * 5 + [None] * 3
    assert limits == [41.0, 41.0, 26.0, 26.0, 11.0, 11.0], "after the failure nothing is tried any more"
    assert patience.failure == "NoAnswer: MLflow did not answer within 11 s"


def test_a_failure_is_kept_in_one_line() -> None:
    patience = Patience()

    def refuse() -> None:
        raise ConnectionError("gone\nfor good")

    assert patience.run(refuse) is None
    assert patience.failure == "ConnectionError: gone"
    assert patience.run(lambda: pytest.fail("it was tried again")) is None


# -- parents, and runs that are ended from outside ------------------------------------------------------------------


def test_the_parent_of_a_study_is_made_once(output: OutputConfig, experiment: Experiment) -> None:
    first = open_parent(output, "parents")
    mark(output, first, "finished")
    assert experiment.client.get_run(first).info.status == "FINISHED"
    assert open_parent(output, "parents") == first
    run = experiment.client.get_run(first)
    assert (run.info.run_name, run.info.status, run.data.tags["study"]) == ("parents", "RUNNING", "parents")
    assert open_parent(replace(output, mlflow=False), "parents") == ""


def test_a_parent_that_cannot_be_made_costs_its_time_and_no_more(
    output: OutputConfig, monkeypatch: pytest.MonkeyPatch, never: threading.Event
) -> None:
    monkeypatch.setattr(store, "open_experiment", lambda *arguments: never.wait())
    monkeypatch.setattr(store, "PATIENCE_S", 0.2)
    monkeypatch.setattr(store, "QUICK_S", 0.1)
    began = time.monotonic()
    assert open_parent(output, "parents") == ""
    assert time.monotonic() - began < 5

    def broken(*arguments: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(store, "open_experiment", broken)
    assert open_parent(output, "parents") == ""


@pytest.mark.parametrize(("status", "theirs"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_another_process_can_end_a_run(output: OutputConfig, experiment: Experiment, status: str, theirs: str) -> None:
    run_id = experiment.client.create_run(experiment.id).info.run_id
    assert mark(output, run_id, status) == ""
    run = experiment.client.get_run(run_id)
    assert (run.info.status, run.data.tags["ditbench.status"]) == (theirs, status)


def test_ending_a_run_from_outside_never_raises(
    output: OutputConfig, under_a_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = mark(output, "0" * 32, "failed")
    assert lost.startswith("MlflowException: ")
    assert "\n" not in lost
    assert mark(OutputConfig(mlflow_uri=under_a_file), "0" * 32, "failed")
    monkeypatch.setattr(store, "attempt", lambda *arguments: pytest.fail("MLflow was used"))
    assert mark(output, "", "failed") == ""
    assert mark(OutputConfig(mlflow=False), "0" * 32, "failed") == ""
