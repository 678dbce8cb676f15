"""The README's commands, end to end, on real digits with a budget of a few steps."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

import methods
from harness.records.files import number
from harness.records.run_folder import RunFolder
from harness.training import trainer
from reports.study.load import load_study
from reports.study.verify import verify
from studies.cli import main
from studies.commands import report
from tests.e2e.conftest import STUDY, Faults, FinishedStudy, Place, contents

Ditbench = Callable[..., tuple[int, str, str]]
MAIN = "fd_efficientnet_lite0_48"


# -- compare --------------------------------------------------------------------------------------------------------


def test_a_comparison_prints_plain_lines_a_table_and_where_the_page_is(finished: FinishedStudy) -> None:
    lines = finished.said.out.splitlines()
    assert finished.said.err == ""
    for number_, cell in enumerate(("sit", "vae_repa"), start=1):
        name = f"cell {number_} of 2: {cell} seed 0: "
        own = [line.removeprefix(name) for line in lines if line.startswith(name)]
        assert [line.split("  ")[0] for line in own if MAIN in line] == ["step 3 of 6", "step 6 of 6"]
        assert own[-1] == "finished"
    page = finished.path / "report" / "index.html"
    assert lines[-1] == f"report: {page}"
    assert page.is_file()
    table = lines[lines.index(f"{MAIN} after 6 steps") :]
    assert [line.split()[0] for line in table[2:4]] == ["sit", "vae_repa"]
    assert any("minus sit" in line for line in table)


@pytest.mark.parametrize("cell", ["sit", "vae_repa"])
def test_a_comparison_leaves_whole_records(finished: FinishedStudy, cell: str) -> None:
    folder = RunFolder(finished.run(cell))
    manifest = folder.manifest()
    assert (manifest["status"], manifest["cell"], manifest["seed"]) == ("finished", cell, 0)
    assert manifest["baseline"] == "sit"
    assert manifest["command"] == ["ditbench", *finished.place.words("compare", *STUDY)]
    assert [line["step"] for line in folder.lines("train")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in folder.lines("eval")] == [3, 6]
    for line in folder.lines("eval"):
        assert line["protocol"] == manifest["digests"]["evaluation"]
        assert MAIN in line["metrics"]
        assert all(math.isfinite(number(value)) for value in line["metrics"].values())
        assert Image.open(folder.path / line["samples"]).size == (320, 96)
    assert manifest["config"]["sections"].keys() == {cell}
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"manifest.json", "train.jsonl", "eval.jsonl", "cost.json", "log.txt", "checkpoints", "samples"}


def test_cells_of_a_comparison_share_weights_stream_data_and_protocol(finished: FinishedStudy) -> None:
    sit, vae_repa = (RunFolder(finished.run(cell)) for cell in ("sit", "vae_repa"))
    ours, theirs = sit.manifest()["digests"], vae_repa.manifest()["digests"]
    assert ours == theirs
    assert ours.keys() == {"training", "evaluation", "initial_weights", "data", "autoencoder"}
    traces = [[line["trace"] for line in folder.lines("train")] for folder in (sit, vae_repa)]
    assert traces[0] == traces[1]
    assert len(set(traces[0])) == 6
    assert sit.lines("train")[-1]["loss"] != vae_repa.lines("train")[-1]["base"], "the term changes the backbone"


def test_a_comparison_is_drawn_from_its_records(finished: FinishedStudy) -> None:
    with (finished.path / "report" / "figures" / "main.csv").open() as file:
        drawn = list(csv.DictReader(file))
    recorded = {
        (cell, line["step"]): line["metrics"][MAIN]
        for cell in ("sit", "vae_repa")
        for line in RunFolder(finished.run(cell)).lines("eval")
    }
    shown = {
        (row["cell"], int(row["step"])): float(row["value"]) for row in drawn if row["cell"] and row["seed"] == "0"
    }
    assert shown == {key: pytest.approx(value, rel=1e-6) for key, value in recorded.items()}


def test_a_comparison_is_in_mlflow_by_cell(finished: FinishedStudy) -> None:
    client = MlflowClient(f"sqlite:///{finished.place.runs}/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"sit/seed0", "vae_repa/seed0"}
    for name, run in runs.items():
        folder = RunFolder(finished.path / name)
        assert run.info.run_id == folder.manifest()["mlflow_run"]
        assert folder.manifest()["mlflow_failure"] == ""
        for key, lines in (("loss", folder.lines("train")), (f"metrics/{MAIN}", folder.lines("eval"))):
            points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}
            wanted = {line["step"]: line["loss"] if key == "loss" else line["metrics"][MAIN] for line in lines}
            assert points == wanted
        pictures = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
        assert pictures == ["samples/step_00000003.png", "samples/step_00000006.png"]


@pytest.mark.usefixtures("blank_figures")
def test_the_same_command_again_changes_no_record(finished: FinishedStudy, ditbench: Ditbench) -> None:
    before = [contents(finished.run(cell)) for cell in ("sit", "vae_repa")]
    status, out, err = ditbench(*finished.place.words("compare", *STUDY))
    assert (status, err) == (0, "")
    assert "cell 1 of 2: sit seed 0: finished" in out
    assert "step 3 of 6" not in out
    assert [contents(finished.run(cell)) for cell in ("sit", "vae_repa")] == before


@pytest.mark.usefixtures("blank_figures")
def test_another_baseline_needs_no_training(
    finished: FinishedStudy, ditbench: Ditbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = finished.place.words("compare", *STUDY, "--baseline")
    status, out, _ = ditbench(*words, "vae_repa")
    assert status == 0
    assert "minus vae_repa" in out
    assert "step 3 of 6" not in out
    monkeypatch.setattr(report, "write_and_print", lambda study: None)
    assert ditbench(*words, "sit")[0] == 0
    manifests = [RunFolder(finished.run(cell)).manifest() for cell in ("sit", "vae_repa")]
    assert [manifest["baseline"] for manifest in manifests] == ["sit", "sit"]


# -- commands on a finished run -------------------------------------------------------------------------------------


def test_evaluate_gives_the_recorded_numbers_again(finished: FinishedStudy, ditbench: Ditbench) -> None:
    run = finished.run("vae_repa")
    before = contents(run)
    for words, line in ((["--step", "3"], 0), ([], 1)):
        recorded = RunFolder(run).lines("eval")[line]
        status, out, err = ditbench("evaluate", str(run), *words, "--format", "json")
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert (found["step"], found["protocol"]) == (recorded["step"], recorded["protocol"])
        assert found["metrics"] == recorded["metrics"], "same weights, same noise, same chunk: the same bits"
        stored = run / "evaluations" / recorded["protocol"][:12] / f"step_{recorded['step']:08d}.json"
        assert json.loads(stored.read_text())["metrics"] == recorded["metrics"]
    after = contents(run)
    assert {name: after[name] for name in before} == before, "the run's own records stay as they are"


def test_evaluate_under_another_protocol_is_another_digest(finished: FinishedStudy, ditbench: Ditbench) -> None:
    run = finished.run("sit")
    recorded = RunFolder(run).lines("eval")[-1]
    reported = load_study(finished.path).runs
    status, out, _ = ditbench(
        "evaluate", str(run), "--evaluation.sampler.num_steps", "3", "--evaluation.classifier=false"
    )
    assert status == 0
    assert "floor" in out.splitlines()[0]
    assert "class_accuracy" not in out
    digests = {path.name for path in (run / "evaluations").iterdir()} - {recorded["protocol"][:12]}
    (other,) = (json.loads((run / "evaluations" / d / "step_00000006.json").read_text()) for d in digests)
    assert other["settings"]["sampler"]["num_steps"] == 3
    assert other["metrics"][MAIN] != recorded["metrics"][MAIN]
    assert load_study(finished.path).runs == reported, (
        "no report shows it beside evaluations under the study's protocol"
    )


def test_samples_are_the_pictures_of_the_run(finished: FinishedStudy, ditbench: Ditbench, tmp_path: Path) -> None:
    """A folder and an .npz hold the same images, and the first of them are those that the run recorded."""
    run, folder, packed = finished.run("sit"), tmp_path / "images", tmp_path / "images.npz"
    for out in (folder, packed):
        status, _, err = ditbench("sample", str(run), "--num", "48", "--out", str(out))
        assert (status, err) == (0, "")
    images = np.load(packed)["arr_0"]
    assert (images.shape, images.dtype) == ((48, 32, 32, 3), np.uint8)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(48)]
    assert all(np.array_equal(np.asarray(Image.open(file)), images[i]) for i, file in enumerate(files))
    picture = np.asarray(Image.open(run / "samples" / "step_00000006.png"))
    for i in range(30):
        row, column = 32 * (i // 10), 32 * (i % 10)
        assert np.array_equal(picture[row : row + 32, column : column + 32], images[i])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "images.npz"], "nothing else is left behind"

    status, _, err = ditbench("sample", str(run), "--num", "48", "--out", str(folder))
    assert status == 2
    assert "exists already: name another place" in err


@pytest.mark.usefixtures("blank_figures")
def test_report_as_json(finished: FinishedStudy, ditbench: Ditbench) -> None:
    status, out, _ = ditbench("report", str(finished.path), "--format", "json")
    assert status == 0
    found = json.loads(out)
    assert found["page"] == str(finished.path / "report" / "index.html")
    assert {row["cell"] for row in found["rows"]} == {"sit", "vae_repa"}
    assert [check["what"] for check in found["checks"]] == [check.what for check in verify(load_study(finished.path))]


# -- other commands -------------------------------------------------------------------------------------------------


def test_methods_lists_every_method(ditbench: Ditbench) -> None:
    status, out, _ = ditbench("methods", "--format", "json")
    rows = json.loads(out)
    assert status == 0
    assert [row["method"] for row in rows] == methods.names()
    for row in rows:
        assert row["source"] == methods.load(row["method"]).disclosure.paper
    status, out, _ = ditbench("methods")
    assert out.splitlines()[0].split() == ["method", "adds", "source", "note"]
    assert [line.split()[0] for line in out.splitlines()[1:] if line[0] != " "] == methods.names()


def test_doctor_says_what_is_there(ditbench: Ditbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITBENCH_WEIGHTS", raising=False)
    status, out, _ = ditbench("doctor", "--format", "json")
    facts = json.loads(out)
    assert status == 0
    assert facts.keys() >= {
        "device",
        "threads",
        "fast bf16",
        "precision auto",
        "cache",
        "python",
        "packages",
        "weights",
    }
    weights = {row["name"]: row for row in facts["weights"]}
    assert Path(weights["autoencoder digits"]["path"]).is_dir()
    assert Path(weights["efficientnet_lite0"]["path"]).is_file()
    assert weights["dinov2_vitb14"]["path"] == ""
    assert "DITBENCH_WEIGHTS" in weights["dinov2_vitb14"]["advice"]

    (tmp_path / "dinov2_vitb14.safetensors").touch()
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    status, out, _ = ditbench("doctor")
    assert status == 0
    assert ["dinov2_vitb14", f"{tmp_path}/dinov2_vitb14.safetensors"] in [line.split() for line in out.splitlines()]


def test_prepare_makes_what_training_reads(place: Place, ditbench: Ditbench) -> None:
    place = replace(place, cache=place.folder / "cache")
    save_images(place.folder / "images", {"blue": 6, "red": 6})
    data = ("--data.name", "imagefolder", "--data.path", str(place.folder / "images"), "--data.holdout", "0.5")
    words = (*data, "--evaluation.num_samples", "6", "--evaluation.kid_subset", "4", "--verify", "full")
    status, out, err = ditbench(*place.words("prepare", *words, "--methods", "sit,repa"))
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "12 images of 2 classes are ready, every shard checked"
    made = contents(place.cache)
    kinds = {name.split("-")[0] for name in made if name.endswith(".npy")}
    assert kinds == {"images", "moments", "tokens"}
    assert not place.runs.exists()
    ditbench(*place.words("prepare", *words, "--methods", "sit,repa"))
    assert contents(place.cache) == made, "a second call only opens them"


def save_images(root: Path, classes: dict[str, int]) -> None:
    """Random pictures in class folders, none the same."""
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")


def test_train_runs_one_method_on_a_folder_of_images(place: Place, ditbench: Ditbench) -> None:
    save_images(place.folder / "images", {"blue": 9, "green": 3, "red": 8})
    words = place.words(
        *("train", "--data.name", "imagefolder", "--data.path", str(place.folder / "images"), "--data.holdout", "0.5"),
        *("--method", "sra", "--seed", "3", "--cell", "early teacher", "--sra.teacher_block", "2", "--study", "mine"),
        *("--budget.amount", "2", "--evaluation.points", "1", "--output.mlflow", "false"),
        *("--evaluation.num_samples", "8", "--evaluation.kid_subset", "4"),
    )
    status, out, err = ditbench(*words)
    assert (status, err) == (0, "")
    assert "cell 1 of 1: early teacher seed 3: finished" in out
    folder = RunFolder(place.runs / "mine" / "early teacher" / "seed3")
    manifest = folder.manifest()
    assert manifest["config"]["sections"]["sra"]["teacher_block"] == 2
    assert (manifest["mlflow_run"], manifest["mlflow_failure"]) == ("", "")
    assert manifest["protocol"]["labels"] == "image i has label i mod 3"
    assert not (place.runs / "mlflow.db").exists()
    assert sorted(path.name for path in place.runs.iterdir()) == ["mine"], "train writes no report"


# -- one bad cell ---------------------------------------------------------------------------------------------------


SHORT = (
    *("--study", "short", "--methods", "faulty,sit", "--seeds", "0", "--budget.amount", "6"),
    *("--evaluation.points", "2", "--output.log_every", "1", "--output.mlflow", "false"),
)


@pytest.mark.usefixtures("blank_figures")
def test_a_cell_that_diverges_is_a_result_and_the_others_go_on(
    place: Place, ditbench: Ditbench, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = place.words("compare", *SHORT)
    faults.are("nan")
    status, out, err = ditbench(*words)
    assert (status, err) == (0, "")
    assert "cell 1 of 2: faulty seed 0: diverged" in out
    assert "cell 2 of 2: sit seed 0: finished" in out
    bad, good = (RunFolder(place.runs / "short" / cell / "seed0") for cell in ("faulty", "sit"))
    assert good.status() == "finished"
    detail = bad.manifest()["status_detail"]
    assert (detail["step"], detail["parts"]) == (4, ["loss", "terms/faulty", "grad_norm"])
    assert (bad.path / detail["checkpoint"] / "state.json").is_file()
    assert [line["step"] for line in bad.lines("eval")] == [3]
    table = out[out.index("after 6 steps") :]
    assert "diverged" in table

    before = contents(bad.path)
    faults.are("")
    monkeypatch.setattr(report, "write_and_print", lambda study: None)
    assert ditbench(*words)[0] == 0
    assert contents(bad.path) == before, "a diverged run is over"


@pytest.mark.usefixtures("blank_figures")
def test_a_cell_that_fails_is_said_and_goes_on_later(
    place: Place, ditbench: Ditbench, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = place.words("compare", *SHORT)
    faults.are("raise")
    status, out, err = ditbench(*words)
    assert status == 1
    assert err == "failed: faulty/seed0: RuntimeError: no space [left] on the device\n"
    assert "cell 2 of 2: sit seed 0: finished" in out
    bad = RunFolder(place.runs / "short" / "faulty" / "seed0")
    assert bad.status() == "failed"
    detail = bad.manifest()["status_detail"]
    assert detail["error"] == "RuntimeError: no space [left] on the device"
    assert "Traceback" in detail["trace"]
    assert 'raise RuntimeError("no space [left]' in (bad.path / detail["log"]).read_text()
    assert [line["step"] for line in bad.lines("train")] == [1, 2, 3, 4]

    faults.are("")
    monkeypatch.setattr(report, "write_and_print", lambda study: None)
    status, out, err = ditbench(*words)
    assert (status, err) == (0, "")
    assert faults.steps() - {0} == {3, 4, 5}, "it went on from its evaluation after step 3"
    assert bad.status() == "finished"
    assert bad.manifest()["status_detail"] == {}


def test_when_no_cell_gets_anywhere_the_status_says_so(place: Place, ditbench: Ditbench, faults: Faults) -> None:
    """It fails before its only evaluation, so there is nothing to report on."""
    faults.are("raise")
    words = place.words("compare", *SHORT, "--methods", "faulty", "--evaluation.points", "1")
    status, _, err = ditbench(*words)
    assert status == 1
    failed, no_report = err.splitlines()
    assert failed == "failed: faulty/seed0: RuntimeError: no space [left] on the device"
    assert no_report.startswith("no report: ")


ONE = (
    *("--study", "short", "--method", "sit", "--budget.amount", "6"),
    *("--evaluation.points", "2", "--output.log_every", "1", "--output.mlflow", "false"),
)


def test_an_interrupt_leaves_a_run_that_goes_on(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.train_step

    def interrupted(run: Any, batch: Any) -> None:
        if batch.step == 4:
            raise KeyboardInterrupt
        step(run, batch)

    words = place.words("train", *ONE)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train_step", interrupted)
        assert main(words) == 130
    assert "train, compare, ablate go on from the last checkpoint" in capsys.readouterr().err
    folder = RunFolder(place.runs / "short" / "sit" / "seed0")
    assert folder.status() == "running"
    assert main(words) == 0
    assert folder.status() == "finished"
    assert [line["step"] for line in folder.lines("train")] == [1, 2, 3, 4, 5, 6]
