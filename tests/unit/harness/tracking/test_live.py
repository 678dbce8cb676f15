"""MLflow on a temporary SQLite store: a view of the records that can fail without stopping a run."""

import json
import logging
import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from harness.config import OutputConfig
from harness.records.run_folder import RunFolder
from harness.tracking import live as tracking
from harness.tracking.live import Session, Tracker, mark, metrics_of, open_parent, tracking_uri
from harness.training.recorder import Recorder
from tests.unit.harness.records.plain_records import manifest

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


def session_of(tracker: Tracker) -> Session:
    assert tracker._session is not None, tracker.failure
    return tracker._session


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


def test_a_record_that_was_read_back_has_the_same_numbers(tmp_path: Path) -> None:
    record = {**train_record(2), "worst": math.inf, "best": {"x": -math.inf}, "note": "infinite"}
    folder = RunFolder(tmp_path)
    folder.append("train", record)
    (read,) = folder.lines("train")
    assert {key: str(value) for key, value in metrics_of(read).items()} == {
        key: str(value) for key, value in metrics_of(record).items()
    }
    assert metrics_of(read)["best/x"] == -math.inf
    assert metrics_of({"step": 3, "metrics": {"fid50k": 9.5}}, "final") == {"final/metrics/fid50k": 9.5}
    assert "note" not in metrics_of(read)


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


def test_points_lie_where_the_records_clocks_put_them(start: Callable[..., Tracker], client: MlflowClient) -> None:
    tracker = start()
    tracker.log({**train_record(1), "train_seconds": 1.5})
    tracker.log({**train_record(2), "train_seconds": 2.5, "evaluation_seconds": 3.25, "io_seconds": 0.0004})
    tracker.finish("finished")
    run = client.get_run(tracker.run_id)
    times = [point.timestamp - run.info.start_time for point in client.get_metric_history(tracker.run_id, "loss")]
    assert times == [1500, 5750]


def test_the_config_is_an_artifact_that_may_change(start: Callable[..., Tracker], client: MlflowClient) -> None:
    tracker = start()
    for threads in (1, 2):
        tracker.config({"runtime": {"threads": threads}, "best": math.inf, "path": Path("x")})
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["config.json"]
    stored = json.loads(Path(client.download_artifacts(tracker.run_id, "config.json")).read_text())
    assert stored == {"runtime": {"threads": 2}, "best": "inf", "path": "x"}
    assert client.get_run(tracker.run_id).data.params == {}


def test_points_are_sent_in_batches(start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start()
    sizes: list[int] = []
    monkeypatch.setattr(session_of(tracker).client, "log_batch", lambda run_id, metrics: sizes.append(len(metrics)))
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


def test_the_same_point_from_two_sides_is_one_point(start: Callable[..., Tracker], client: MlflowClient) -> None:
    """`sync` may write what a live run has not sent yet."""
    live = start()
    other = start(live.run_id)
    for tracker in (live, other):
        tracker.log({**train_record(1), "train_seconds": 0.125})
    other.log(train_record(2))
    other.flush()
    live.log(train_record(3))
    live.finish("finished")
    assert (live.failure, other.failure) == ("", "")
    for key in ("loss", "grad_norm", "images"):
        assert sorted(step for step, _ in history(client, live.run_id, key)) == [1, 2, 3], key


COLD = """
import sys
from harness.config import OutputConfig
from harness.tracking.live import Tracker

runs, number = sys.argv[1:]
sys.stdin.readline()
tracker = Tracker(OutputConfig(runs=runs), "cold", f"cell{number}/seed0", {"seed": number}, "")
for step in range(1, 4):
    tracker.log({"step": step, "loss": float(number)})
tracker.config({"number": number})
tracker.finish("finished")
print(tracker.failure or "fine")
"""


COLD_PROCESSES = 4 if os.environ.get("DITBENCH_FULL") == "1" else 2


@pytest.mark.slow
def test_cold_processes_may_start_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COLD, str(tmp_path / "runs")]
    started = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(COLD_PROCESSES)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120) for process in started] == [(b"fine\n", b"")] * COLD_PROCESSES
    client = MlflowClient(tracking_uri(OutputConfig(runs=str(tmp_path / "runs"))))
    experiment = client.get_experiment_by_name("cold")
    assert experiment is not None
    runs = {run.data.tags["seed"]: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {str(i) for i in range(COLD_PROCESSES)}
    for number, run in runs.items():
        assert history(client, run.info.run_id, "loss") == [(step, float(number)) for step in (1, 2, 3)]


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

    monkeypatch.setattr(session_of(tracker).client, "log_batch", refuse)
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
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_manifest(manifest())
    tracker = Tracker(OutputConfig(runs=str(tmp_path / "runs"), mlflow_uri=under_a_file), "digits", "name", TAGS, "")
    Recorder(folder, tracker).end("finished", {})
    assert folder.status() == "finished"
    assert folder.manifest()["mlflow_failure"] == tracker.failure != ""


# -- hanging --------------------------------------------------------------------------------------------------------


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Waiting for it takes until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_is_waited_for_or_given_up(never: threading.Event) -> None:
    assert tracking.attempt(lambda: 3, 10) == 3
    with pytest.raises(ZeroDivisionError):
        tracking.attempt(lambda: 1 // 0, 10)
    began = time.monotonic()
    with pytest.raises(tracking.NoAnswer, match=r"within 0\.05 s"):
        tracking.attempt(never.wait, 0.05)
    assert time.monotonic() - began < 5


def test_mlflow_is_silent_while_it_is_used_and_after_it_was_given_up(never: threading.Event) -> None:
    loggers = [logging.getLogger(name) for name in ("mlflow.store", "alembic.runtime", "urllib3.connectionpool")]
    speaking = [logger.getEffectiveLevel() for logger in loggers]
    assert tracking.attempt(lambda: [logger.isEnabledFor(logging.ERROR) for logger in loggers], 10) == [False] * 3
    assert [logger.getEffectiveLevel() for logger in loggers] == speaking
    parents = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3.connectionpool")]
    levels = [logger.level for logger in parents]
    try:
        with pytest.raises(tracking.NoAnswer):
            tracking.attempt(never.wait, 0.05)
        assert not any(logger.isEnabledFor(logging.ERROR) for logger in loggers)
    finally:
        for logger, level in zip(parents, levels, strict=True):
            logger.setLevel(level)


def test_a_store_that_never_answers_costs_its_time_once(
    output: OutputConfig, monkeypatch: pytest.MonkeyPatch, never: threading.Event
) -> None:
    answers: list[str] = []

    def hang(*arguments: Any) -> Session:
        never.wait()
        answers.append("late")
        return Session(MlflowClient("sqlite://"), "late", 0, frozenset())

    monkeypatch.setattr(tracking, "prepare_store", lambda *arguments: None)
    monkeypatch.setattr(tracking, "open_session", hang)
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)
    monkeypatch.setattr(tracking, "QUICK_S", 0.1)
    began = time.monotonic()
    tracker = Tracker(output, "digits", "name", TAGS, "")
    for step in range(1, 50):
        tracker.log(train_record(step))
        tracker.flush()
    tracker.finish("finished")
    assert 0.2 < time.monotonic() - began < 5
    assert tracker.failure == "NoAnswer: MLflow did not answer within 0.3 s"
    never.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "mlflow"]:
        thread.join(10)
    assert answers == ["late"]
    assert tracker.run_id == "", "an answer that comes too late changes nothing"


def test_the_parent_of_a_study_is_made_once(output: OutputConfig, client: MlflowClient) -> None:
    first = open_parent(output, "parents")
    mark(output, first, "finished")
    assert client.get_run(first).info.status == "FINISHED"
    assert open_parent(output, "parents") == first
    run = client.get_run(first)
    assert (run.info.run_name, run.info.status, run.data.tags["study"]) == ("parents", "RUNNING", "parents")
    assert open_parent(replace(output, mlflow=False), "parents") == ""


def test_a_parent_that_cannot_be_made_costs_its_time_and_no_more(
    output: OutputConfig, monkeypatch: pytest.MonkeyPatch, never: threading.Event
) -> None:
    monkeypatch.setattr(tracking, "prepare_store", lambda *arguments: never.wait())
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)
    began = time.monotonic()
    assert open_parent(output, "parents") == ""
    assert time.monotonic() - began < 5

    def broken(*arguments: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(tracking, "prepare_store", broken)
    assert open_parent(output, "parents") == ""


def test_slow_calls_share_one_patience(start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    """40 s of patience, and of a flush of 16 s 15 count: for the third of them 11 s are left."""
    clock, limits, durations = [0.0], [], [0.5, 16.0, 0.5, 16.0, 0.5, 16.0]
    tracker = start()
    tracker._patience = 40.0

    def attempt(work: Callable[[], Any], seconds: float) -> Any:
        limits.append(seconds)
        takes = durations.pop(0)
        clock[0] += min(seconds, takes)
        if takes > seconds:
            raise tracking.NoAnswer(f"MLflow did not answer within {seconds:.0f} s")
        return work()

    monkeypatch.setattr(tracking, "attempt", attempt)
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    for step in range(1, 9):
        tracker.log(train_record(step))
        tracker.flush()
    assert limits == [41.0, 41.0, 26.0, 26.0, 11.0, 11.0], "after the failure nothing is tried any more"
    assert tracker.failure == "NoAnswer: MLflow did not answer within 11 s"


def test_an_artifact_that_does_not_fit_stops_nothing(start: Callable[..., Tracker], tmp_path: Path) -> None:
    """The operating system refuses the file as it does on a full disk."""
    tracker = start()
    picture = tmp_path / "step_00000004.png"
    picture.write_bytes(b"x" * (3 << 20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, limits[1]))
    try:
        tracker.artifact(picture, "samples")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tracker.failure.startswith("OSError: ")
    assert "File too large" in tracker.failure
    tracker.log(train_record(5))
    tracker.finish("finished")


# -- ended from outside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "theirs"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_another_process_can_end_a_run(
    start: Callable[..., Tracker], client: MlflowClient, output: OutputConfig, status: str, theirs: str
) -> None:
    run_id = start().run_id
    assert tracking.mark(output, run_id, status) == ""
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["ditbench.status"]) == (theirs, status)


def test_ending_a_run_from_outside_never_raises(
    output: OutputConfig, under_a_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = tracking.mark(output, "0" * 32, "failed")
    assert lost.startswith("MlflowException: ")
    assert "\n" not in lost
    assert tracking.mark(OutputConfig(mlflow_uri=under_a_file), "0" * 32, "failed")
    monkeypatch.setattr(tracking, "attempt", lambda *arguments: pytest.fail("MLflow was used"))
    assert tracking.mark(output, "", "failed") == ""
    assert tracking.mark(OutputConfig(mlflow=False), "0" * 32, "failed") == ""
