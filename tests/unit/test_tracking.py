"""MLflow on a temporary SQLite store: a view of the records that can fail without stopping a run."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from harness import tracking
from harness.config import OutputConfig
from harness.records import RunFolder
from harness.tracking import Tracker, metrics_of, tracking_uri

TAGS = {"study": "digits", "cell": "repa+vae_repa", "method": "repa+vae_repa", "seed": "0"}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> OutputConfig:
    """A folder of studies whose name needs care in a URI."""
    return OutputConfig(runs=str(tmp_path_factory.mktemp("store") / "all runs, élan"))


@pytest.fixture(scope="module")
def client(output: OutputConfig) -> MlflowClient:
    tracking.prepare_store(output, "digits")
    return MlflowClient(tracking_uri(output))


@pytest.fixture
def start(output: OutputConfig, client: MlflowClient) -> Callable[..., Tracker]:
    def build(run_id: str = "", study: str = "digits") -> Tracker:
        return Tracker(output, study, "repa+vae_repa/seed0", TAGS, run_id)

    return build


def train_record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "images": 16 * step,
        "loss": 1.0 / step,
        "terms": {"repa": {"value": -0.5, "weight": 0.5}, "vae_repa": {"value": 0.25, "weight": 1.0}},
        "grad_norm": math.nan,
        "trace": "ab" * 32,
        "diagnostics": {},
    }


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


# -- what arrives ---------------------------------------------------------------------------------------------------


def test_numbers_of_a_record_get_flat_legal_keys() -> None:
    record = {
        **train_record(4),
        "metrics": {"fd_efficientnet_lite0_898": 12.5},
        "terms": {"a+b": {"value": 1, "weight": 0.5}, "c@d=e": {"value": 2.0, "weight": 0.0}},
        "converged": True,
        "samples": "samples/step_00000004.png",
    }
    assert metrics_of(record) == {
        "images": 64.0,
        "loss": 0.25,
        "terms/a_b/value": 1.0,
        "terms/a_b/weight": 0.5,
        "terms/c_d_e/value": 2.0,
        "terms/c_d_e/weight": 0.0,
        "grad_norm": pytest.approx(math.nan, nan_ok=True),
        "metrics/fd_efficientnet_lite0_898": 12.5,
    }


def test_records_arrive_by_step_with_name_and_tags(start: Callable[..., Tracker], client: MlflowClient) -> None:
    tracker = start()
    for step in (1, 2, 4):
        tracker.log(train_record(step))
    tracker.log({"step": 4, "metrics": {"fd_efficientnet_lite0_898": 7.5}})
    assert history(client, tracker.run_id, "loss") == [], "points wait until they are sent together"
    tracker.finish("finished")

    assert tracker.failure == ""
    assert history(client, tracker.run_id, "loss") == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert history(client, tracker.run_id, "terms/vae_repa/value") == [(1, 0.25), (2, 0.25), (4, 0.25)]
    assert history(client, tracker.run_id, "metrics/fd_efficientnet_lite0_898") == [(4, 7.5)]
    assert all(math.isnan(value) for _, value in history(client, tracker.run_id, "grad_norm"))
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "repa+vae_repa/seed0"
    assert run.info.status == "FINISHED"
    assert {key: run.data.tags[key] for key in TAGS} == TAGS
    assert run.data.tags["ditbench.status"] == "finished"


@pytest.mark.parametrize(
    ("status", "theirs"), [("finished", "FINISHED"), ("diverged", "FINISHED"), ("failed", "FAILED")]
)
def test_the_status_is_ours_in_a_tag(
    start: Callable[..., Tracker], client: MlflowClient, status: str, theirs: str
) -> None:
    tracker = start()
    tracker.finish(status)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["ditbench.status"]) == (theirs, status)


def test_a_study_is_an_experiment_with_its_own_artifacts(
    start: Callable[..., Tracker], client: MlflowClient, output: OutputConfig, tmp_path: Path
) -> None:
    picture = tmp_path / "step_00000004.png"
    picture.write_bytes(b"picture")
    runs = [start(study=study) for study in ("digits", "other", "digits")]
    for tracker in runs:
        tracker.artifact(picture, "samples")
        assert tracker.failure == ""
    experiments = [client.get_run(tracker.run_id).info.experiment_id for tracker in runs]
    assert experiments[0] == experiments[2] != experiments[1]
    assert client.get_experiment(experiments[1]).name == "other"
    stored = Path(output.runs) / "mlartifacts" / "other" / runs[1].run_id / "artifacts" / "samples" / picture.name
    assert stored.read_bytes() == b"picture"
    assert [file.path for file in client.list_artifacts(runs[0].run_id, "samples")] == [f"samples/{picture.name}"]


def test_points_are_sent_in_batches(start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start()
    sizes: list[int] = []
    monkeypatch.setattr(tracker._client, "log_batch", lambda run_id, metrics: sizes.append(len(metrics)))
    numbers = len(metrics_of(train_record(1)))
    assert numbers == 7
    for step in range(1, 301):
        tracker.log(train_record(step))
    tracker.flush()
    assert sum(sizes) == 300 * numbers
    assert max(sizes) <= tracking.BATCH <= 1000, "MLflow takes at most 1000 metrics in a call"
    assert len(sizes) == 5, "903 + 903 points are sent in 2 calls each, the last 294 in one"


# -- continuing -----------------------------------------------------------------------------------------------------


def test_a_continued_run_writes_no_point_twice(start: Callable[..., Tracker], client: MlflowClient) -> None:
    first = start()
    for step in (1, 2, 3):
        first.log(train_record(step))
    first.flush()
    again = start(first.run_id)
    assert again.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    for step in (2, 3, 4):
        again.log(train_record(step))
    again.finish("finished")
    assert [step for step, _ in history(client, first.run_id, "loss")] == [1, 2, 3, 4]
    assert [step for step, _ in history(client, first.run_id, "terms/repa/weight")] == [1, 2, 3, 4]


# -- failing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def under_a_file(tmp_path: Path) -> Iterator[str]:
    """A URI of a database that cannot be made."""
    (tmp_path / "file").touch()
    yield f"sqlite:///{tmp_path}/file/mlflow.db"


@pytest.mark.parametrize("kind", ["sqlite", "unknown"])
def test_a_store_that_cannot_be_used_turns_tracking_off(tmp_path: Path, under_a_file: str, kind: str) -> None:
    uri = under_a_file if kind == "sqlite" else "carrier-pigeon://roof"
    tracker = Tracker(OutputConfig(runs=str(tmp_path / "runs"), mlflow_uri=uri), "digits", "name", TAGS, "")
    assert tracker.failure
    assert "\n" not in tracker.failure
    assert len(tracker.failure) < 300
    tracker.log(train_record(1))
    tracker.flush()
    tracker.artifact(tmp_path / "nothing.png")
    tracker.finish("finished")


def test_a_failure_in_the_middle_stops_nothing(start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start()
    calls: list[int] = []

    def refuse(run_id: str, metrics: list[Metric]) -> None:
        calls.append(len(metrics))
        raise ConnectionError

    monkeypatch.setattr(tracker._client, "log_batch", refuse)
    tracker.log(train_record(1))
    tracker.flush()
    assert tracker.failure == "ConnectionError: ", "an error without a text is a failure like any other"
    tracker.log(train_record(2))
    tracker.finish("finished")
    assert len(calls) == 1, "after the first failure nothing is sent any more"


def test_off_means_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any) -> None:
        raise AssertionError("MLflow was used")

    monkeypatch.setattr(tracking, "prepare_store", forbidden)
    tracker = Tracker(OutputConfig(runs=str(tmp_path / "runs"), mlflow=False), "digits", "name", TAGS, "")
    tracker.log(train_record(1))
    tracker.artifact(tmp_path / "nothing.png")
    tracker.finish("finished")
    assert (tracker.run_id, tracker.failure) == ("", "")
    assert not (tmp_path / "runs").exists()


def test_the_default_store_is_an_absolute_path_beside_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(OutputConfig(runs="runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri(OutputConfig(mlflow_uri="http://127.0.0.1:5000")) == "http://127.0.0.1:5000"


def test_records_do_not_depend_on_it(tmp_path: Path, under_a_file: str) -> None:
    """A run's folder is written whole although tracking is off, and its manifest says why it is."""
    from harness.trainer import end_run

    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_manifest({"status": "running"})
    tracker = Tracker(OutputConfig(runs=str(tmp_path / "runs"), mlflow_uri=under_a_file), "digits", "name", TAGS, "")
    end_run(folder, tracker, "finished", 4, {})
    assert folder.status() == "finished"
    assert folder.manifest()["mlflow_failure"] == tracker.failure != ""
