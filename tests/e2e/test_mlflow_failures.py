"""MLflow away, locked, broken or dying: the training is the same, waits a bounded time, says so; `sync` mends it."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file
from werkzeug.serving import WSGIRequestHandler, make_server

from harness.config import OutputConfig
from harness.records.run_folder import RunFolder
from harness.tracking import feed
from harness.tracking import store as mlflow_store
from harness.tracking.mirror import recorded_points, stored
from harness.training.trainer import Event
from studies import cli
from studies.runs import run
from tests.e2e.conftest import TIMES, Place

STUDY = "fragile"
TRAIN = (
    *("train", "--study", STUDY, "--method", "vae_repa", "--seed", "0", "--budget.amount", "4"),
    *("--evaluation.points", "2", "--output.log_every", "1", "--output.checkpoint_every", "1"),
)
"""Four steps, each logged and sent; pictures after 2 and 4."""


@dataclass
class Trained:
    """A training that is over, and how MLflow held it up."""

    folder: RunFolder
    printed: str
    waits: list[float] = field(default_factory=list)
    """Seconds of each call."""

    @property
    def failure(self) -> str:
        failure: str = self.folder.manifest()["mlflow_failure"]
        return failure


@pytest.fixture
def train(
    tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Trained]:
    """`train(uri, status=0)`: train in this process, with that tracking URI, to that exit status."""
    waits: list[float] = []
    attempt = mlflow_store.attempt

    def timed(work: Callable[[], Any], seconds: float) -> Any:
        began = time.monotonic()
        try:
            return attempt(work, seconds)
        finally:
            waits.append(time.monotonic() - began)

    monkeypatch.setattr(mlflow_store, "attempt", timed)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def build(uri: str, status: int = 0) -> Trained:
        words = Place(tmp_path, shared_cache).words(*TRAIN, "--output.mlflow_uri", uri)
        assert cli.main(words) == status
        printed = capsys.readouterr()
        assert bool(printed.err) == bool(status)
        return Trained(RunFolder(tmp_path / "runs" / STUDY / "vae_repa" / "seed0"), printed.out, waits)

    return build


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has a second for what is slow, and a call that takes a fifth of one is."""
    monkeypatch.setattr(mlflow_store, "PATIENCE_S", 1.0)
    monkeypatch.setattr(mlflow_store, "QUICK_S", 0.2)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    runs = tmp_path_factory.mktemp("tables")
    mlflow_store.open_experiment(OutputConfig(runs=str(runs)), "other")
    return runs / "mlflow.db"


@pytest.fixture
def store(tables: Path, tmp_path: Path) -> Path:
    """The default database of `train`, with its tables."""
    path = tmp_path / "runs" / "mlflow.db"
    path.parent.mkdir()
    shutil.copyfile(tables, path)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> RunFolder:
    """The same training without MLflow."""
    place = Place(tmp_path_factory.mktemp("reference"), shared_cache)
    assert cli.main(place.words(*TRAIN, "--output.mlflow", "false")) == 0
    return RunFolder(place.runs / STUDY / "vae_repa" / "seed0")


def assert_trained_all_the_same(trained: Trained, reference: RunFolder) -> None:
    """Records and weights are those of a run without MLflow, and one line says what is missing."""
    folder = trained.folder
    for name in ("train", "eval"):
        ours, theirs = (without_times(one.path / f"{name}.jsonl") for one in (folder, reference))
        assert ours == theirs
    ours, theirs = (
        load_file(run.checkpoints / "step_00000004" / "backbone.safetensors") for run in (folder, reference)
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert folder.status() == "finished"
    assert trained.failure
    told = [line for line in trained.printed.splitlines() if "MLflow" in line]
    (line,) = told
    assert trained.failure in line
    assert line.endswith(f"send it with: ditbench sync {folder.path.parents[1]}")


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_mended(trained: Trained, capsys: pytest.CaptureFixture[str], uri: str = "") -> dict[str, Any]:
    """`sync` brings everything to where it should have gone, and has nothing left to do; returns its row."""
    study, uri = str(trained.folder.path.parents[1]), uri or trained.folder.manifest()["mlflow_uri"]
    rows = []
    for _ in range(2):
        assert cli.main(["sync", study, "--mlflow_uri", uri, "--format", "json"]) == 0
        rows += json.loads(capsys.readouterr().out)
    assert (rows[0]["action"], rows[1]["action"]) == ("added", "unchanged")
    assert values(uri, rows[0]["mlflow_run"]) == {
        key: [stored(value)] for key, (value, _) in recorded_points(list(trained.folder.all_lines())).items()
    }
    pictures = MlflowClient(uri).list_artifacts(rows[0]["mlflow_run"], "samples")
    assert [picture.path for picture in pictures] == ["samples/step_00000002.png", "samples/step_00000004.png"]
    assert (trained.folder.manifest()["mlflow_run"], trained.failure) == (rows[0]["mlflow_run"], "")
    return rows[0]


def values(uri: str, run_id: str) -> dict[tuple[str, int], list[Any]]:
    """Every value that MLflow holds, by key and step."""
    client = MlflowClient(uri)
    found: dict[tuple[str, int], list[Any]] = {}
    for key in client.get_run(run_id).data.metrics:
        for point in client.get_metric_history(run_id, key):
            found.setdefault((key, point.step), []).append(stored(point.value))
    return found


# -- servers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


class Silent(WSGIRequestHandler):
    def log(self, *arguments: Any) -> None:
        pass


class Server:
    """MLflow's own server on a port, which answers `num_requests` requests, or all until it is closed."""

    def __init__(self, port: int, num_requests: int = sys.maxsize) -> None:
        from mlflow.server import app

        self._server = make_server("127.0.0.1", port, app, request_handler=Silent)
        self._server.timeout = 0.05
        self._left, self._done = num_requests, threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self._server.handle_timeout = self._nothing_came  # type: ignore[method-assign]
        while self._left > 0 and not self._done.is_set():
            self._left -= 1
            self._server.handle_request()
        self._server.server_close()

    def _nothing_came(self) -> None:
        self._left += 1

    def close(self) -> None:
        self._done.set()
        self._thread.join()


@pytest.fixture
def serve(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start servers of one store; those that are left are closed."""
    from mlflow.server import handlers

    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(tmp_path / "served"))
    monkeypatch.setattr(handlers, "_artifact_repo", None)
    with mlflow_store.quiet():
        handlers.initialize_backend_stores(f"sqlite:///{store}", default_artifact_root="mlflow-artifacts:/")
    started: list[Server] = []

    def start(port: int, num_requests: int = sys.maxsize) -> Server:
        started.append(Server(port, num_requests))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_a_server_that_dies_midway(
    train: Callable[..., Trained],
    reference: RunFolder,
    port: int,
    serve: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"http://127.0.0.1:{port}"
    dying = serve(port, num_requests=9)  # experiment, run and config take about six, a picture one or two, a step one
    trained = train(uri)
    assert_trained_all_the_same(trained, reference)
    assert f"{uri}/api/" in trained.failure
    dying.close()
    serve(port)
    run_id = trained.folder.manifest()["mlflow_run"]
    assert {1} <= {step for _, step in values(uri, run_id)} < {1, 2, 3, 4}
    assert assert_mended(trained, capsys)["mlflow_run"] == run_id


def test_nobody_listens(
    train: Callable[..., Trained],
    reference: RunFolder,
    port: int,
) -> None:
    trained = train(f"http://127.0.0.1:{port}")
    assert_trained_all_the_same(trained, reference)
    assert len(trained.waits) == 1, "after the first failure nothing is tried any more"
    assert trained.waits[0] < 20


@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_answers(train: Callable[..., Trained], reference: RunFolder) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(50)
        trained = train(f"http://127.0.0.1:{deaf.getsockname()[1]}")
    assert_trained_all_the_same(trained, reference)
    assert trained.failure == "NoAnswer: MLflow did not answer within 1.2 s"
    assert len(trained.waits) == 1
    assert 1.1 < trained.waits[0] < 10


# -- databases and files --------------------------------------------------------------------------------------------

LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("impatient")
def test_a_database_that_another_process_has_locked(
    train: Callable[..., Trained], reference: RunFolder, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", LOCK, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locking:
        assert locking.stdout is not None
        assert locking.stdout.readline() == b"locked\n"
        trained = train("")
        assert_trained_all_the_same(trained, reference)
        assert len(trained.waits) == 1
        assert trained.waits[0] < 10
        assert locking.stdin is not None
        locking.stdin.close()
    assert_mended(trained, capsys)


def test_a_database_that_may_only_be_read(
    train: Callable[..., Trained],
    reference: RunFolder,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow takes `file:` for a folder, and makes it
    trained = train(f"sqlite:///file:{store}?mode=ro&uri=true")
    assert_trained_all_the_same(trained, reference)
    assert len(trained.waits) == 1
    assert_mended(trained, capsys, f"sqlite:///{store}")


def test_a_file_that_is_no_database(
    train: Callable[..., Trained],
    reference: RunFolder,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    database = tmp_path / "broken.db"
    database.write_bytes(b"no database" * 1000)
    trained = train(f"sqlite:///{database}")
    assert_trained_all_the_same(trained, reference)
    assert "file is not a database" in trained.failure
    assert len(trained.waits) == 1
    assert_mended(trained, capsys, f"sqlite:///{store}")


def test_artifacts_that_cannot_be_written(
    train: Callable[..., Trained], reference: RunFolder, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocking = store.with_name("mlartifacts")
    blocking.touch()
    trained = train("")
    assert_trained_all_the_same(trained, reference)
    assert "mlartifacts" in trained.failure
    blocking.unlink()
    assert_mended(trained, capsys)


# -- runs that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def fails_after_step_3(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The next training dies when it has recorded step 3."""
    original = run.train

    def dying(*arguments: Any) -> Iterator[Event]:
        monkeypatch.setattr(run, "train", original)
        for event in original(*arguments):
            yield event
            if (event.kind, event.step) == ("train", 3):
                raise RuntimeError("out of luck")

    return lambda: monkeypatch.setattr(run, "train", dying)


def test_a_failed_run_is_ended_and_goes_on_as_one_run(
    train: Callable[..., Trained],
    reference: RunFolder,
    store: Path,
    fails_after_step_3: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails_after_step_3()
    failed = train("", status=1)
    uri, run_id = f"sqlite:///{store}", failed.folder.manifest()["mlflow_run"]
    assert run_state(uri, run_id) == ("FAILED", "failed")
    assert {step for _, step in values(uri, run_id)} == {1, 2}

    trained = train("")
    assert without_times(trained.folder.path / "train.jsonl") == without_times(reference.path / "train.jsonl")
    assert "MLflow" not in trained.printed
    assert (trained.failure, trained.folder.manifest()["mlflow_run"]) == ("", run_id)
    assert run_state(uri, run_id) == ("FINISHED", "finished")
    assert values(uri, run_id) == {
        key: [stored(value)] for key, (value, _) in recorded_points(list(trained.folder.all_lines())).items()
    }
    assert cli.main(["sync", str(trained.folder.path.parents[1])]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "unchanged", "live and rebuilt are the same"


def test_points_sent_before_a_checkpoint_that_never_came(
    train: Callable[..., Trained],
    store: Path,
    fails_after_step_3: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 3 is made twice: MLflow keeps its first points, once; its seconds are others, until `sync`."""
    monkeypatch.setattr(feed, "LINES", 1)
    fails_after_step_3()
    first = train("", status=1)
    uri, run_id = f"sqlite:///{store}", first.folder.manifest()["mlflow_run"]
    sent = values(uri, run_id)
    assert {step for _, step in sent} == {1, 2, 3}

    folder = train("").folder
    recorded = {key: [stored(value)] for key, (value, _) in recorded_points(list(folder.all_lines())).items()}
    kept = values(uri, run_id)
    assert kept.keys() == recorded.keys()
    assert {key: kept[key] for key in sent} == sent
    changed = {key for key in kept if kept[key] != recorded[key]}
    assert ("train_seconds", 3) in changed
    assert {(name.partition("/")[0], step) for name, step in changed} <= {(name, 3) for name in TIMES}

    assert cli.main(["sync", str(folder.path.parents[1])]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "rebuilt"
    assert values(uri, folder.manifest()["mlflow_run"]) == recorded


def test_a_continued_run_sends_what_is_missing(
    train: Callable[..., Trained], store: Path, port: int, fails_after_step_3: Callable[[], None]
) -> None:
    fails_after_step_3()
    assert train(f"http://127.0.0.1:{port}", status=1).folder.manifest()["mlflow_run"] == ""
    trained = train("")
    assert trained.failure == ""
    assert values(f"sqlite:///{store}", trained.folder.manifest()["mlflow_run"]) == {
        key: [stored(value)] for key, (value, _) in recorded_points(list(trained.folder.all_lines())).items()
    }


def run_state(uri: str, run_id: str) -> tuple[str, str]:
    """MLflow's status of a run, and ours."""
    found = MlflowClient(uri).get_run(run_id)
    return found.info.status, found.data.tags["ditbench.status"]
