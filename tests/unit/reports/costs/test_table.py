"""The cost of the compared cells: by hand, with fields that old records lack, and times that do not count."""

import json
import math
import shutil

import pandas as pd
import pytest

from harness.records.files import write_json
from reports.costs import table as costs
from reports.result.findings import notes
from reports.study.load import load_study
from tests.unit.reports.records_factory import edit_manifest, fail, run_folder, write_study
from tests.unit.reports.table_files import table_files

CELLS = {"sit": "sit", "repa": "repa", "sra": "sra"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"), CELLS, seeds=(0, 1, 2))


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written, tmp_path / "digits")


def by_cell(rows):
    return {row["cell"]: row for row in rows}


def test_the_counted_cost_by_hand(written):
    rows = by_cell(costs.counted_rows(load_study(written)))
    # repa: 0.0226 / 0.0206 = 1.0971; online the encoder's 0.3 once: (3 x 0.0226 + 0.3) / (3 x 0.0206) = 5.951.
    assert rows["repa"] == {
        "cell": "repa",
        "forward, GMACs": "0.0206",
        "forward, GFLOPs": "0.0412",
        "heads, GMACs": "0.002",
        "teacher, GMACs": "0",
        "encoder, GMACs": "(0.3)",
        "VAE encoding, GMACs": "(0.5)",
        "training, GFLOPs": "0.1356",
        "against sit": "+9.7%",
        "online, GFLOPs": "0.7356",
        "online against sit": "+495%",
    }
    # sra: the teacher's 0.011 once beside three times 0.0226; it has no encoder, so nothing would run online.
    assert (rows["sra"]["teacher, GMACs"], rows["sra"]["against sit"]) == ("0.011", "+27.5%")
    assert rows["sra"]["online, GFLOPs"] == rows["sit"]["against sit"] == "–"
    assert rows["sra"]["encoder, GMACs"] == "0"
    assert rows["sit"]["training, GFLOPs"] == "0.1236"


def test_sizes_and_times_by_hand(path):
    edit_manifest(run_folder(path, "sra", 1), shared_device=True)
    study = load_study(path)
    rows = by_cell(costs.measured_rows(study))
    # 800 steps of 0.05 x 1.5 s, 0.03 s of evaluation and 0.001 s of reading and writing a step.
    assert rows["sra"]["train seconds"] == "60, 60 ‡, 60"
    assert rows["sit"]["train seconds"] == "40, 40, 40"
    assert rows["sit"]["evaluation seconds"] == "24, 24, 24"
    assert rows["sit"]["I/O seconds"] == "0.8, 0.8, 0.8"
    assert rows["repa"]["external parameters"] == "4,870,000"
    # 1,797 images through the VAE's 0.5 and the encoder's 0.3 GMACs: 2 x 0.8 x 1797.
    assert (rows["repa"]["caches, GFLOPs"], rows["repa"]["cached images"]) == ("2,875", "1,797")
    assert "‡ Shared its device with another run: its seconds do not count." in costs.time_notes(study)


def test_medians_leave_out_what_shared_its_device(path):
    for seed, speed in enumerate((100.0, 5.0, 300.0)):
        folder = run_folder(path, "sra", seed)
        lines = [{**line, "images_per_s": speed} for line in folder.lines("train")]
        folder.path.joinpath("train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        evaluations = [{**line, "train_seconds": 1000 / speed} for line in folder.lines("eval")]
        folder.path.joinpath("eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    edit_manifest(run_folder(path, "sra", 1), shared_device=True)
    study = load_study(path)
    assert costs.images_per_s(study, "sra") == 200.0
    table = costs.cost_table(study).set_index("cell")
    assert table.loc["sra", "images_per_s"] == 200.0
    assert table.loc["sra", "train_seconds"] == pytest.approx((10 + 1000 / 300) / 2)
    assert table.loc["sra", "vae_encode_gmacs"] == 0.5
    for seed in (0, 2):
        edit_manifest(run_folder(path, "sra", seed), shared_device=True)
    study = load_study(path)
    assert math.isnan(costs.images_per_s(study, "sra"))
    assert by_cell(costs.measured_rows(study))["sra"]["images/s"] == "–"


def test_what_old_records_lack_is_a_dash(path):
    for seed in (0, 1, 2):
        write_json(run_folder(path, "repa", seed).path / "cost.json", {"train_gflops_per_image": 0.1359})
        fail(run_folder(path, "sra", seed), "no memory")
    study = load_study(path)
    counted, measured = by_cell(costs.counted_rows(study)), by_cell(costs.measured_rows(study))
    assert counted["repa"]["training, GFLOPs"] == "0.1359"
    assert counted["repa"]["forward, GFLOPs"] == counted["repa"]["online, GFLOPs"] == "–"
    assert set(counted["sra"].values()) == {"sra", "–"}
    assert set(measured["sra"].values()) == {"sra", "–"}
    assert pd.isna(costs.cost_table(study).set_index("cell").loc["repa", "cache_gflops"])
    for text in table_files(costs.section(study))["cost"][1:]:
        assert text.count("repa") == 2


def test_a_run_that_failed_early_does_not_hide_the_cost_of_its_cell(path):
    fail(run_folder(path, "repa", 0), "no memory")
    assert by_cell(costs.counted_rows(load_study(path)))["repa"]["against sit"] == "+9.7%"


def test_times_of_unequal_machines_are_said_not_to_be_comparable(path):
    edit_manifest(run_folder(path, "sra", 1), environment={"device": "NVIDIA H100"})
    study = load_study(path)
    (remark,) = [note for note in costs.time_notes(study) if "not comparable" in note]
    assert remark.endswith("NVIDIA H100: sra seed 1).")
    said = "Seconds of runs on different devices or with different threads are not comparable."
    assert said in notes(study)
    edit_manifest(run_folder(path, "sra", 1), shared_device=True)
    assert said not in notes(load_study(path))
