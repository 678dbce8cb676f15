"""`ditbench sync` on written records: MLflow holds what they hold, once, however it stood before."""

import json
import math
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from harness.config import OutputConfig
from harness.records.run_folder import RunFolder
from harness.tracking.feed import Feed
from harness.tracking.mirror import recorded_points
from harness.tracking.store import open_experiment, tracking_uri
from studies.dispatch.leases import claim
from studies.runs.folders import lease_path
from tests.e2e.conftest import ROOT, contents, run_process
from tests.unit.harness.records.plain_records import eval_line, train_line
from tests.unit.reports.records_factory import edit_lines, edit_manifest, fail, write_study

Ditbench = Callable[..., tuple[int, str, str]]
STARTED = "2026-01-02T03:04:05+00:00"
STARTED_MS = 1767323045000


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of studies with one store, whose tables are made once."""
    return tmp_path_factory.mktemp("sync") / "runs"


@pytest.fixture(scope="module")
def client(runs: Path) -> MlflowClient:
    output = OutputConfig(runs=str(runs))
    open_experiment(output, "other")
    return MlflowClient(tracking_uri(output))


@pytest.fixture
def another(runs: Path, client: MlflowClient, tmp_path: Path) -> str:
    """The URI of a second store; a copy has its tables already."""
    shutil.copyfile(runs / "mlflow.db", tmp_path / "another.db")
    return f"sqlite:///{tmp_path}/another.db"


@pytest.fixture
def study(runs: Path, client: MlflowClient, request: pytest.FixtureRequest) -> Path:
    """A study of this test's own: two cells, one of them a sum, whose records hold what JSON cannot."""
    path = write_study(runs, {"sit": "sit", "a'b,c=1": "repa+vae_repa"}, seeds=(3,), study=request.node.name)
    for cell in path.iterdir():
        edit_manifest(RunFolder(cell / "seed3"), started=STARTED)
    edit_lines(folder_of(path), "train", keep=20, grad_norm="nan", loss="inf", base="-inf")
    return path


def folder_of(study: Path, cell: str = "sit") -> RunFolder:
    return RunFolder(study / cell / "seed3")


def sync(ditbench: Ditbench, study: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Sync and return the rows by cell."""
    status, out, err = ditbench("sync", str(study), *words, "--format", "json")
    assert (status, err) == (0, "")
    return {row["cell"]: row for row in json.loads(out)}


def actions(ditbench: Ditbench, study: Path) -> list[str]:
    """What sync did to sit, and to the other cell."""
    rows = sync(ditbench, study)
    return [rows["sit"]["action"], rows["a'b,c=1"]["action"]]


def runs_of(client: MlflowClient, study: Path) -> list[Run]:
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def run_of(client: MlflowClient, study: Path, cell: str = "sit") -> Run:
    """The only run of a cell."""
    (run,) = [run for run in runs_of(client, study) if run.data.tags["cell"] == cell]
    return run


def points_of(client: MlflowClient, run: Run) -> dict[tuple[str, int], tuple[Any, int]]:
    """Value and time since the start of every point, which must be there once; NaN as text."""
    found: dict[tuple[str, int], tuple[Any, int]] = {}
    for key in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, key):
            assert (key, point.step) not in found
            value = "nan" if math.isnan(point.value) else point.value
            found[key, point.step] = value, point.timestamp - run.info.start_time
    return found


def wanted_points(folder: RunFolder) -> dict[tuple[str, int], tuple[Any, int]]:
    """What the records say, infinities as the largest number of the database."""
    largest = {math.inf: sys.float_info.max, -math.inf: -sys.float_info.max}
    return {
        key: ("nan" if math.isnan(value) else largest.get(value, value), time)
        for key, (value, time) in recorded_points(list(folder.all_lines())).items()
    }


def artifacts_of(study: Path, run_id: str) -> Path:
    return study.parent / "mlartifacts" / study.name / run_id / "artifacts"


def dump(runs: Path) -> list[str]:
    """The whole database as text."""
    with sqlite3.connect(runs / "mlflow.db") as connection:
        return list(connection.iterdump())


def begin(study: Path) -> Feed:
    """What feeds MLflow while sit is trained, at its beginning."""
    edit_manifest(folder_of(study), mlflow_run="")
    feed = Feed(OutputConfig(runs=str(study.parent)), folder_of(study))
    edit_manifest(folder_of(study), mlflow_run=feed.run_id)
    return feed


# -- from nothing ---------------------------------------------------------------------------------------------------


def test_recorded_points_by_hand(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    clocks = {"train_seconds": 1.25, "io_seconds": 0.0}
    terms = {"a": {"value": math.inf, "weight": 0.5}}
    folder.append("train", train_line(4, **clocks, evaluation_seconds=0.0, loss=0.5, terms=terms))
    folder.append("eval", eval_line(4, **clocks, evaluation_seconds=2.0, metrics={"fd_x_8": 7.0}, samples="x.png"))
    assert recorded_points(list(folder.all_lines())) == {
        ("images", 4): (64.0, 1250),
        ("train_gflops", 4): (2.0, 1250),
        ("train_seconds", 4): (1.25, 1250),
        ("evaluation_seconds", 4): (0.0, 1250),
        ("io_seconds", 4): (0.0, 1250),
        ("base", 4): (1.5, 1250),
        ("grad_norm", 4): (0.5, 1250),
        ("terms/a/weight", 4): (0.5, 1250),
        ("loss", 4): (0.5, 1250),
        ("terms/a/value", 4): (math.inf, 1250),
        ("metrics/fd_x_8", 4): (7.0, 3250),
        ("point", 4): (1.0, 3250),
    }


def test_everything_recorded_gets_into_mlflow(study: Path, client: MlflowClient, ditbench: Ditbench) -> None:
    rows = sync(ditbench, study)
    assert rows.keys() == {"sit", "a'b,c=1"}
    for cell, row in rows.items():
        folder, run = folder_of(study, cell), run_of(client, study, cell)
        manifest, points = folder.manifest(), points_of(client, run)
        assert points == wanted_points(folder)
        assert len(points) > 200
        assert {key: row[key] for key in ("seed", "status", "points", "action")} == {
            "seed": 3,
            "status": "finished",
            "points": len(points),
            "action": "added",
        }
        assert manifest["mlflow_run"] == row["mlflow_run"] == run.info.run_id
        assert manifest["mlflow_uri"] == row["mlflow_uri"] == tracking_uri(OutputConfig(runs=str(study.parent)))
        assert manifest["mlflow_failure"] == ""
        assert (run.info.run_name, run.info.status, run.info.start_time) == (f"{cell}/seed3", "FINISHED", STARTED_MS)
        assert run.info.end_time == STARTED_MS + max(time for _, time in points.values())
        tags = {key: run.data.tags[key] for key in ("study", "cell", "method", "seed", "ditbench.status")}
        assert tags == {
            **{key: str(manifest[key]) for key in ("study", "cell", "method", "seed")},
            "ditbench.status": "finished",
        }
        stored = artifacts_of(study, run.info.run_id)
        assert json.loads((stored / "config.json").read_text()) == manifest["config"]
        assert contents(stored / "samples") == contents(folder.samples)
    sit = run_of(client, study)
    by_step = {point.step: point.value for point in client.get_metric_history(sit.info.run_id, "grad_norm")}
    assert math.isnan(by_step[400])
    assert {point.value for point in client.get_metric_history(sit.info.run_id, "loss") if point.step == 400} == {
        sys.float_info.max
    }


def test_again_changes_nothing(study: Path, runs: Path, ditbench: Ditbench) -> None:
    assert actions(ditbench, study) == ["added", "added"]
    before = dump(runs), contents(runs / "mlartifacts"), contents(study)
    assert actions(ditbench, study) == ["unchanged", "unchanged"]
    after = dump(runs), contents(runs / "mlartifacts"), contents(study)
    assert after == before


def test_it_prints_a_row_a_run_and_needs_no_torch(study: Path, runs: Path) -> None:
    code = (
        "import sys; from studies.cli import main; status = main(sys.argv[1:]); assert 'torch' not in sys.modules;"
        "sys.exit(status)"
    )
    result = run_process([sys.executable, "-c", code, "sync", study.name], runs)
    assert (result.returncode, result.stderr) == (0, "")
    header, *rows, where = result.stdout.splitlines()
    assert header.split() == ["cell", "seed", "status", "points", "action"]
    points = [str(len(recorded_points(list(folder_of(study, cell).all_lines())))) for cell in ("a'b,c=1", "sit")]
    assert [row.split() for row in rows] == [
        ["a'b,c=1", "3", "finished", points[0], "added"],
        ["sit", "3", "finished", points[1], "added"],
    ]
    assert where == f"mlflow: sqlite:///{runs}/mlflow.db"


# -- what was there before ------------------------------------------------------------------------------------------


def test_missing_points_are_added_to_the_run(study: Path, client: MlflowClient, ditbench: Ditbench) -> None:
    feed = begin(study)
    for record in folder_of(study).lines("train")[:5]:
        feed.add("train", record)
    feed.flush()
    edit_manifest(folder_of(study), mlflow_failure="ConnectionError: gone")
    assert sync(ditbench, study)["sit"]["action"] == "added"
    run = run_of(client, study)
    assert run.info.run_id == feed.run_id
    assert points_of(client, run) == wanted_points(folder_of(study))
    assert run.info.status == "FINISHED"
    assert folder_of(study).manifest()["mlflow_failure"] == ""


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(Metric("images", 1.0, 5, 20), id="changed"),
        pytest.param(Metric("images", 20 * 64.0, 5, 20), id="twice"),
        pytest.param(Metric("images", 1.0, 5, 21), id="no_such_step"),
        pytest.param(Metric("stray", 1.0, 5, 20), id="no_such_key"),
    ],
)
def test_points_that_disagree_make_the_run_anew(
    study: Path, client: MlflowClient, ditbench: Ditbench, wrong: Metric
) -> None:
    old = sync(ditbench, study)["sit"]["mlflow_run"]
    client.log_batch(old, metrics=[wrong])
    row = sync(ditbench, study)["sit"]
    assert row["action"] == "rebuilt"
    run = run_of(client, study)
    assert run.info.run_id == row["mlflow_run"] == folder_of(study).manifest()["mlflow_run"] != old
    assert points_of(client, run) == wanted_points(folder_of(study))
    assert client.get_run(old).info.lifecycle_stage == "deleted"
    assert actions(ditbench, study) == ["unchanged", "unchanged"]


def test_a_run_that_the_manifest_does_not_name_is_found_by_its_tags(
    study: Path, client: MlflowClient, ditbench: Ditbench
) -> None:
    run_id = sync(ditbench, study)["sit"]["mlflow_run"]
    edit_manifest(folder_of(study), mlflow_run="", mlflow_failure="NoAnswer: late")
    row = sync(ditbench, study)["sit"]
    assert (row["mlflow_run"], row["action"]) == (run_id, "unchanged")
    manifest = folder_of(study).manifest()
    assert (manifest["mlflow_run"], manifest["mlflow_failure"]) == (run_id, "")


def test_one_run_a_cell_and_seed_is_left(study: Path, client: MlflowClient, ditbench: Ditbench) -> None:
    """A training that was killed before its run was in the manifest leaves an empty one."""
    run_id = sync(ditbench, study)["sit"]["mlflow_run"]
    begin(study)
    edit_manifest(folder_of(study), mlflow_run=run_id)
    assert len(runs_of(client, study)) == 3
    assert actions(ditbench, study) == ["added", "unchanged"]
    assert run_of(client, study).info.run_id == run_id
    assert len(runs_of(client, study)) == 2
    assert actions(ditbench, study) == ["unchanged", "unchanged"]


def test_what_was_deleted_comes_back(study: Path, client: MlflowClient, ditbench: Ditbench) -> None:
    first = sync(ditbench, study)["sit"]["mlflow_run"]
    client.delete_run(first)
    assert actions(ditbench, study) == ["added", "unchanged"]
    assert run_of(client, study).info.run_id != first
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    sync(ditbench, study)
    assert points_of(client, run_of(client, study)) == wanted_points(folder_of(study))
    assert actions(ditbench, study) == ["unchanged", "unchanged"]


def test_a_picture_that_was_cut_short_is_sent_again(study: Path, ditbench: Ditbench) -> None:
    run_id = sync(ditbench, study)["sit"]["mlflow_run"]
    stored = artifacts_of(study, run_id)
    picture, *_ = sorted((stored / "samples").iterdir())
    picture.write_bytes(picture.read_bytes()[:-20])
    (stored / "config.json").unlink()
    assert actions(ditbench, study) == ["added", "unchanged"]
    assert contents(stored / "samples") == contents(folder_of(study).samples)
    assert (stored / "config.json").is_file()


def test_tags_and_name_are_set_right(study: Path, client: MlflowClient, ditbench: Ditbench) -> None:
    run_id = sync(ditbench, study)["sit"]["mlflow_run"]
    client.set_tag(run_id, "method", "other")
    client.update_run(run_id, name="other")
    assert actions(ditbench, study) == ["added", "unchanged"]
    run = run_of(client, study)
    assert (run.data.tags["method"], run.info.run_name) == ("sit", "sit/seed3")


# -- states ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_progress(study: Path) -> Iterator[None]:
    """Another process trains sit: nine lines are recorded, its lease is held."""
    edit_manifest(folder_of(study), status="running")
    edit_lines(folder_of(study), "train", keep=9)
    (folder_of(study).path / "eval.jsonl").unlink()
    lease = claim(lease_path(study.parent, study.name, "sit", 3))
    assert lease is not None
    yield
    lease.release()


@pytest.mark.usefixtures("in_progress")
def test_a_run_in_progress_is_brought_up_to_date_and_not_ended(
    study: Path, client: MlflowClient, ditbench: Ditbench
) -> None:
    folder, feed = folder_of(study), begin(study)
    *early, late = folder.lines("train")
    for record in early[:5]:
        feed.add("train", record)
    feed.flush()
    for record in [*early[5:], late]:
        feed.add("train", record)
    before = folder.manifest_path.read_bytes()

    row = sync(ditbench, study)["sit"]

    assert (row["status"], row["action"], row["mlflow_run"]) == ("running", "added", feed.run_id)
    assert points_of(client, run_of(client, study)) == wanted_points(folder)
    assert folder.manifest_path.read_bytes() == before
    assert run_of(client, study).info.status == "RUNNING"
    feed.flush()
    assert feed.failure == ""
    assert points_of(client, run_of(client, study)) == wanted_points(folder), "what it sends late stays single"
    client.log_metric(feed.run_id, "images", 1.0, 5, 20)
    begin(study)
    edit_manifest(folder, mlflow_run=feed.run_id)
    row = sync(ditbench, study)["sit"]
    assert (row["action"], row["mlflow_run"]) == ("unchanged", feed.run_id)
    assert len(runs_of(client, study)) == 3, "nothing that the other process may write to is deleted"


@pytest.mark.usefixtures("in_progress")
def test_a_run_that_has_recorded_nothing_is_left_to_its_own_process(
    study: Path, client: MlflowClient, ditbench: Ditbench
) -> None:
    (folder_of(study).path / "train.jsonl").unlink()
    row = sync(ditbench, study)["sit"]
    assert (row["points"], row["action"], row["mlflow_run"]) == (0, "unchanged", "")
    assert [run.data.tags["cell"] for run in runs_of(client, study)] == ["a'b,c=1"]


@pytest.mark.usefixtures("in_progress")
def test_a_run_in_progress_whose_feed_has_failed_gets_a_run(
    study: Path, client: MlflowClient, ditbench: Ditbench
) -> None:
    folder = folder_of(study)
    before = folder.manifest_path.read_bytes()
    assert [sync(ditbench, study)["sit"]["action"] for _ in range(2)] == ["added", "unchanged"]
    run = run_of(client, study)
    assert (points_of(client, run), run.info.status) == (wanted_points(folder), "RUNNING")
    assert folder.manifest_path.read_bytes() == before


def test_two_at_once_make_each_run_once(study: Path, client: MlflowClient) -> None:
    command = [sys.executable, "-m", "studies.cli", "sync", str(study), "--format", "json"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in both]
    assert [errors for _, errors in printed] == [b"", b""]
    done = [[row["action"] for row in json.loads(out)] for out, _ in printed]
    assert sorted(done) == [["added", "added"], ["unchanged", "unchanged"]]
    assert len(runs_of(client, study)) == 2


@pytest.mark.parametrize(
    ("recorded", "ours", "theirs"),
    [
        ("finished", "finished", "FINISHED"),
        ("diverged", "diverged", "FINISHED"),
        ("failed", "failed", "FAILED"),
        ("running", "interrupted", "KILLED"),
    ],
)
def test_the_status_is_the_recorded_one(
    study: Path, client: MlflowClient, ditbench: Ditbench, recorded: str, ours: str, theirs: str
) -> None:
    feed = begin(study)
    if recorded == "failed":
        fail(folder_of(study), "out of memory")
    edit_manifest(folder_of(study), status=recorded)
    assert sync(ditbench, study)["sit"]["mlflow_run"] == feed.run_id
    run = run_of(client, study)
    assert (run.data.tags["ditbench.status"], run.info.status) == (ours, theirs)


def test_records_of_a_run_that_has_just_begun(study: Path, client: MlflowClient, ditbench: Ditbench) -> None:
    folder = folder_of(study)
    edit_manifest(folder, status="running")
    for name in ("train", "eval"):
        (folder.path / f"{name}.jsonl").unlink()
    assert sync(ditbench, study)["sit"]["points"] == 0
    assert run_of(client, study).data.metrics == {}
    assert actions(ditbench, study) == ["unchanged", "unchanged"]


def test_a_copy_of_a_study_is_a_study_of_its_own(study: Path, client: MlflowClient, ditbench: Ditbench) -> None:
    """Its manifests still name the first one and its runs, which must not be touched."""
    first = sync(ditbench, study)["sit"]["mlflow_run"]
    copy = study.with_name(f"{study.name}_copy")
    shutil.copytree(study, copy)
    row = sync(ditbench, copy)["sit"]
    assert (row["action"], row["mlflow_run"] == first) == ("added", False)
    assert run_of(client, copy).data.tags["study"] == copy.name
    assert actions(ditbench, study) == ["unchanged", "unchanged"]


# -- where to -------------------------------------------------------------------------------------------------------


def test_another_store_can_be_named(study: Path, another: str, ditbench: Ditbench) -> None:
    assert {row["mlflow_uri"] for row in sync(ditbench, study, "--mlflow_uri", another).values()} == {another}
    assert folder_of(study).manifest()["mlflow_uri"] == another
    run = run_of(MlflowClient(another), study)
    assert points_of(MlflowClient(another), run) == wanted_points(folder_of(study))


def test_the_store_of_the_runs_is_the_default(study: Path, another: str, ditbench: Ditbench) -> None:
    edit_manifest(folder_of(study), config={"output": {"mlflow_uri": another}})
    rows = sync(ditbench, study)
    assert rows["sit"]["mlflow_uri"] == another
    assert rows["a'b,c=1"]["mlflow_uri"] == f"sqlite:///{study.parent}/mlflow.db"


@pytest.mark.parametrize("kind", ["pigeon", "corrupt"])
def test_a_store_that_cannot_be_used_is_one_line(study: Path, tmp_path: Path, ditbench: Ditbench, kind: str) -> None:
    (tmp_path / "corrupt.db").write_bytes(b"no database" * 1000)
    uri = f"sqlite:///{tmp_path}/corrupt.db" if kind == "corrupt" else "carrier-pigeon://roof"
    status, out, err = ditbench("sync", str(study), "--mlflow_uri", uri)
    assert (status, out) == (2, "")
    assert err.startswith(f"ditbench: MLflow at {uri} failed (")
    assert err.endswith("or give another --mlflow_uri\n")
    assert err.count("\n") == 1
    assert "mlflow_run" not in folder_of(study).manifest()


def test_a_folder_without_runs_is_one_line(tmp_path: Path, ditbench: Ditbench) -> None:
    status, out, err = ditbench("sync", str(tmp_path))
    assert (status, out) == (2, "")
    assert err.startswith(f"ditbench: {tmp_path} holds no runs: ")
