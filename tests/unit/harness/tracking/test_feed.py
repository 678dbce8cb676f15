"""A run that trains feeds MLflow, on a temporary SQLite store: what arrives, and failures that do not stop the run."""

import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from harness.config import OutputConfig
from harness.records.run_folder import RunFolder, run_path
from harness.tracking import feed as feeding
from harness.tracking import mirror, store
from harness.tracking.feed import Feed
from harness.tracking.mirror import Mirror, recorded_points
from harness.tracking.store import open_experiment, tracking_uri
from harness.training.recorder import Recorder
from tests.unit.harness.records.plain_records import CONFIG, eval_line, manifest, train_line

CELL = "repa+vae_repa"
TAGS = {"study": "digits", "cell": CELL, "method": CELL, "seed": "0"}
STARTED = "2026-01-02T03:04:05+00:00"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> OutputConfig:
    """A folder of studies whose name needs care in a URI."""
    return OutputConfig(runs=str(tmp_path_factory.mktemp("store") / "all runs, élan"))


@pytest.fixture(scope="module")
def client(output: OutputConfig) -> MlflowClient:
    return open_experiment(output, "digits").client


@pytest.fixture
def start(output: OutputConfig, client: MlflowClient) -> Callable[..., Feed]:
    def build(run_id: str = "", study: str = "digits", parent: str = "", **config: Any) -> Feed:
        return Feed(output, folder_of(output, study, run_id, config), parent)

    return build


def folder_of(output: OutputConfig, study: str = "digits", run_id: str = "", config: Any = None) -> RunFolder:
    """A run folder whose manifest names a run of MLflow."""
    folder = RunFolder(run_path(output.runs, study, CELL, 0))
    folder.create()
    recorded = {**CONFIG, **(config or {})}
    folder.write_manifest(manifest(cell=CELL, method=CELL, config=recorded, started=STARTED, mlflow_run=run_id))
    return folder


def train_record(step: int) -> dict[str, Any]:
    terms = {"repa": {"value": -0.5, "weight": 0.5}, "vae_repa": {"value": 0.25, "weight": 1.0}}
    return train_line(step, loss=1.0 / step, terms=terms, grad_norm=math.nan, trace="ab" * 32, diagnostics={})


def mirror_of(feed: Feed) -> Mirror:
    assert feed._mirror is not None, feed.failure
    return feed._mirror


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def picture_of(output: OutputConfig, study: str = "digits", size: int = 7) -> dict[str, Any]:
    """A record of an evaluation, with a picture of that many bytes."""
    path = RunFolder(run_path(output.runs, study, CELL, 0)).samples / "step_00000004.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return eval_line(4, metrics={"fd_efficientnet_lite0_898": 7.5}, samples=f"samples/{path.name}")


# -- what arrives ---------------------------------------------------------------------------------------------------


def test_records_arrive_by_step_with_name_and_tags(
    start: Callable[..., Feed], client: MlflowClient, output: OutputConfig
) -> None:
    feed = start(parent="f" * 32)
    for step in (1, 2, 4):
        feed.add("train", train_record(step))
    feed.add("eval", picture_of(output))
    assert history(client, feed.run_id, "loss") == [], "points wait until they are sent together"
    assert client.get_run(feed.run_id).data.tags["ditbench.status"] == "running"
    feed.end("finished")

    assert feed.failure == ""
    assert history(client, feed.run_id, "loss") == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert history(client, feed.run_id, "terms/vae_repa/value") == [(1, 0.25), (2, 0.25), (4, 0.25)]
    assert history(client, feed.run_id, "metrics/fd_efficientnet_lite0_898") == [(4, 7.5)]
    assert all(math.isnan(value) for _, value in history(client, feed.run_id, "grad_norm"))
    assert [file.path for file in client.list_artifacts(feed.run_id, "samples")] == ["samples/step_00000004.png"]
    run = client.get_run(feed.run_id)
    assert run.info.run_name == f"{CELL}/seed0"
    assert run.info.status == "FINISHED"
    assert {key: run.data.tags[key] for key in TAGS} == TAGS
    assert run.data.tags["mlflow.parentRunId"] == "f" * 32
    assert run.data.tags["ditbench.status"] == "finished"
    assert run.data.params == {}


@pytest.mark.parametrize(
    ("status", "theirs"), [("finished", "FINISHED"), ("diverged", "FINISHED"), ("failed", "FAILED")]
)
def test_the_status_is_ours_in_a_tag(
    start: Callable[..., Feed], client: MlflowClient, status: str, theirs: str
) -> None:
    feed = start()
    feed.end(status)
    run = client.get_run(feed.run_id)
    assert (run.info.status, run.data.tags["ditbench.status"]) == (theirs, status)


def test_a_study_is_an_experiment_with_its_own_artifacts(
    start: Callable[..., Feed], client: MlflowClient, output: OutputConfig
) -> None:
    feeds = [start(study=study) for study in ("digits", "other", "digits")]
    for feed, study in zip(feeds, ("digits", "other", "digits"), strict=True):
        feed.add("eval", picture_of(output, study))
        feed.flush()
        assert feed.failure == ""
    experiments = [client.get_run(feed.run_id).info.experiment_id for feed in feeds]
    assert experiments[0] == experiments[2] != experiments[1]
    assert client.get_experiment(experiments[1]).name == "other"
    artifacts = Path(output.runs) / "mlartifacts" / "other" / feeds[1].run_id / "artifacts"
    assert (artifacts / "samples" / "step_00000004.png").read_bytes() == b"x" * 7


def test_points_lie_where_the_records_clocks_put_them(start: Callable[..., Feed], client: MlflowClient) -> None:
    """The run begins and ends by its records, whenever they are sent."""
    feed = start()
    feed.add("train", {**train_record(1), "train_seconds": 1.5, "evaluation_seconds": 0.0, "io_seconds": 0.0})
    feed.add("train", {**train_record(2), "train_seconds": 2.5, "evaluation_seconds": 3.25, "io_seconds": 0.0004})
    feed.end("finished")
    run = client.get_run(feed.run_id)
    assert run.info.start_time == 1767323045000
    times = [point.timestamp - run.info.start_time for point in client.get_metric_history(feed.run_id, "loss")]
    assert times == [1500, 5750]
    assert run.info.end_time - run.info.start_time == 5750


def test_the_config_is_an_artifact_that_may_change(start: Callable[..., Feed], client: MlflowClient) -> None:
    """Also to one of the same length."""
    feed = start(runtime={"threads": 1}, best=math.inf)
    start(feed.run_id, runtime={"threads": 2}, best=math.inf)
    assert [file.path for file in client.list_artifacts(feed.run_id)] == ["config.json"]
    stored = json.loads(Path(client.download_artifacts(feed.run_id, "config.json")).read_text())
    assert stored == {**CONFIG, "runtime": {"threads": 2}, "best": "inf"}


def test_points_are_sent_in_batches(start: Callable[..., Feed], monkeypatch: pytest.MonkeyPatch) -> None:
    """1015 + 1015 points of 29 lines each are more than a call takes; the last 14 lines are not sent yet."""
    feed, sizes = start(), []
    monkeypatch.setattr(feeding, "LINES", 29)
    monkeypatch.setattr(mirror_of(feed)._client, "log_batch", lambda run_id, metrics: sizes.append(len(metrics)))
    wide = {**train_record(1), "diagnostics": {f"d{i}": 0.5 for i in range(23)}}
    assert len(recorded_points([("train", wide)])) == 35
    for step in range(1, 73):
        feed.add("train", {**wide, "step": step})
    assert sizes == [900, 115, 900, 115]
    assert mirror.BATCH <= 1000, "MLflow takes at most 1000 metrics in a call"
    feed.flush()
    assert sum(sizes) == 72 * 35


# -- continuing -----------------------------------------------------------------------------------------------------


def test_a_continued_run_writes_no_point_twice(start: Callable[..., Feed], client: MlflowClient) -> None:
    first = start()
    for step in (1, 2, 3):
        first.add("train", train_record(step))
    first.end("failed")
    again = start(first.run_id)
    assert again.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    for step in (2, 3, 4):
        again.add("train", train_record(step))
    again.add("train", train_record(4))
    again.end("finished")
    assert [step for step, _ in history(client, first.run_id, "loss")] == [1, 2, 3, 4]
    assert [step for step, _ in history(client, first.run_id, "terms/repa/weight")] == [1, 2, 3, 4]


def test_a_continued_run_sends_the_pictures_that_are_missing(
    start: Callable[..., Feed], client: MlflowClient, output: OutputConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, record, sent = start(), picture_of(output), []
    again = start(first.run_id)
    again.add("eval", record)
    again.flush()
    assert [file.path for file in client.list_artifacts(first.run_id, "samples")] == [record["samples"]]
    third = start(first.run_id)
    monkeypatch.setattr(mirror_of(third)._client, "log_artifact", lambda *arguments: sent.append(arguments))
    third.add("eval", record)
    third.flush()
    assert (third.failure, sent) == ("", []), "a picture that is there is not sent again"


def test_the_same_point_from_two_sides_is_one_point(start: Callable[..., Feed], client: MlflowClient) -> None:
    """`sync` may write what a run that trains has not sent yet."""
    training = start()
    other = start(training.run_id)
    for feed in (training, other):
        feed.add("train", {**train_record(1), "train_seconds": 0.125})
    other.add("train", train_record(2))
    other.flush()
    training.add("train", train_record(3))
    training.end("finished")
    assert (training.failure, other.failure) == ("", "")
    for key in ("loss", "grad_norm", "images"):
        assert sorted(step for step, _ in history(client, training.run_id, key)) == [1, 2, 3], key


COLD = """
import sys
from pathlib import Path
from harness.config import OutputConfig
from harness.records.run_folder import RunFolder
from harness.tracking.feed import Feed
from tests.unit.harness.records.plain_records import CONFIG, manifest

runs, number = sys.argv[1:]
folder = RunFolder(Path(runs) / "cold" / "sit" / f"seed{number}")
folder.create()
folder.write_manifest(manifest(seed=int(number), config={**CONFIG, "number": number}))
sys.stdin.readline()
feed = Feed(OutputConfig(runs=runs), folder)
for step in range(1, 4):
    feed.add("train", {"step": step, "loss": float(number)})
feed.end("finished")
print(feed.failure or "fine")
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
def under_a_file(tmp_path: Path) -> str:
    """The URI of a database that cannot be made."""
    (tmp_path / "file").touch()
    return f"sqlite:///{tmp_path}/file/mlflow.db"


@pytest.mark.parametrize("kind", ["sqlite", "unknown"])
def test_a_store_that_cannot_be_used_turns_tracking_off(tmp_path: Path, under_a_file: str, kind: str) -> None:
    uri = under_a_file if kind == "sqlite" else "carrier-pigeon://roof"
    broken = OutputConfig(runs=str(tmp_path / "runs"), mlflow_uri=uri)
    feed = Feed(broken, folder_of(broken))
    assert feed.failure
    assert "\n" not in feed.failure
    assert len(feed.failure) < 300
    feed.add("train", train_record(1))
    feed.flush()
    feed.end("finished")
    assert feed.run_id == ""


def test_a_failure_in_the_middle_stops_nothing(start: Callable[..., Feed], monkeypatch: pytest.MonkeyPatch) -> None:
    feed = start()
    calls: list[int] = []

    def refuse(run_id: str, metrics: list[Metric]) -> None:
        calls.append(len(metrics))
        raise ConnectionError

    monkeypatch.setattr(mirror_of(feed)._client, "log_batch", refuse)
    feed.add("train", train_record(1))
    feed.flush()
    assert feed.failure == "ConnectionError: ", "an error without a text is a failure like any other"
    feed.add("train", train_record(2))
    feed.end("finished")
    assert len(calls) == 1, "after the first failure nothing is sent any more"


def test_off_means_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any) -> None:
        raise AssertionError("MLflow was used")

    monkeypatch.setattr(feeding, "open_experiment", forbidden)
    monkeypatch.setattr(store, "attempt", forbidden)
    feed = Feed(OutputConfig(runs=str(tmp_path / "runs"), mlflow=False), RunFolder(tmp_path / "runs"))
    feed.add("train", train_record(1))
    feed.end("finished")
    assert (feed.run_id, feed.failure) == ("", "")
    assert not (tmp_path / "runs").exists()


def test_records_do_not_depend_on_it(tmp_path: Path, under_a_file: str) -> None:
    """A run's folder is written whole although tracking is off, and its manifest says why it is."""
    broken = OutputConfig(runs=str(tmp_path / "runs"), mlflow_uri=under_a_file)
    folder = folder_of(broken)
    feed = Feed(broken, folder)
    Recorder(folder, feed).end("finished", {})
    assert folder.status() == "finished"
    assert folder.manifest()["mlflow_failure"] == feed.failure != ""


def test_an_artifact_that_does_not_fit_stops_nothing(start: Callable[..., Feed], output: OutputConfig) -> None:
    """The operating system refuses the file as it does on a full disk."""
    feed, record = start(), picture_of(output, size=3 << 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, limits[1]))
    try:
        feed.add("eval", record)
        feed.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert feed.failure.startswith("OSError: ")
    assert "File too large" in feed.failure
    feed.add("train", train_record(5))
    feed.end("finished")


# -- hanging --------------------------------------------------------------------------------------------------------


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Waiting for it takes until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_a_store_that_never_answers_costs_its_time_once(
    output: OutputConfig, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, never: threading.Event
) -> None:
    answers: list[Mirror] = []

    def hang(*arguments: Any) -> Mirror:
        never.wait()
        answers.append(Mirror(*arguments))
        return answers[0]

    folder = folder_of(output)
    monkeypatch.setattr(feeding, "Mirror", hang)
    monkeypatch.setattr(store, "PATIENCE_S", 0.2)
    monkeypatch.setattr(store, "QUICK_S", 0.1)
    monkeypatch.setattr(feeding, "open_experiment", lambda *arguments: store.Experiment(client, "1"))
    began = time.monotonic()
    feed = Feed(output, folder)
    for step in range(1, 50):
        feed.add("train", train_record(step))
        feed.flush()
    feed.end("finished")
    assert 0.2 < time.monotonic() - began < 5
    assert feed.failure == "NoAnswer: MLflow did not answer within 0.3 s"
    never.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "mlflow"]:
        thread.join(10)
    assert len(answers) == 1
    assert feed.run_id == "", "an answer that comes too late changes nothing"
