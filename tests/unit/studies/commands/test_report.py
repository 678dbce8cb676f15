"""`ditbench report` with targets and with several studies: what is printed, written and refused."""

import json

import pytest

from harness.errors import UserError
from harness.records.files import digest
from reports.page.figures import Picture
from studies.commands import report
from tests.unit.reports.records_factory import MAIN, edit_manifest, run_folder, set_values, write_study


@pytest.fixture(autouse=True)
def unpainted(monkeypatch):
    """Figures are not drawn, which is most of a report's time."""
    monkeypatch.setattr("reports.page.figures.picture", lambda draw, look, wide: Picture([], "data:,"))
    monkeypatch.setattr("reports.figures.files.save", lambda draw, frame, stem, look: [])


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    paths = [write_study(folder, {"sit": "sit", "repa": "repa"}, study=name) for name in ("a", "b")]
    for path in paths:
        set_values(path, "sit", 20.0, 20.0)
        set_values(path, "repa", 10.0, 30.0)
        for run in path.glob("*/seed*"):
            edit_manifest(run_folder(path, run.parent.name, int(run.name[4:])), digests={"data": digest(path.name)})
    return [str(path) for path in paths]


def test_targets_are_printed_and_stand_beside_the_final_one(studies, capsys):
    assert report.main([studies[0], "--target", "1,300", "--target", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"sit did not reach {MAIN} 1.000 within the budget at 2 of 2 seeds." in printed
    assert f"sit reached {MAIN} 300.0 after ≤ 100 steps, 2 seeds." in printed
    assert report.main([studies[0], "--target", "1", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["targets"]
    assert [(row["target"], row["cell"], row["num_reached"]) for row in found[:1] + found[2:]] == [
        (20.0, "sit", 2),
        (1.0, "sit", 0),
        (1.0, "repa", 0),
    ]
    assert found[2]["steps_seed0"] == "inf"


@pytest.mark.parametrize("text", ["x", "520,", "nan", "1,inf"])
def test_a_target_that_is_no_number_is_refused(studies, text):
    with pytest.raises(UserError, match="no number or list of numbers such as 520"):
        report.main([studies[0], "--target", text])


def test_several_studies_have_a_joint_report(studies, tmp_path, capsys):
    out = tmp_path / "joint"
    assert report.main([*studies, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"joint report: {out}/index.html" and (out / "index.html").is_file()
    assert [line for line in printed if line.startswith("report: ")] == [
        f"report: {study}/report/index.html" for study in studies
    ]
    # Half and one and a half times at either seed of both: sqrt(0.75) of sit's; better at one seed of two.
    (row,) = [line.split() for line in printed if line.startswith("repa") and "of" in line.split()]
    assert row[:3] == ["repa", "−13.4%", "0.50"]
    assert report.main([*studies, "--out", str(out), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["studies"]) == 2


def test_folders_that_do_not_fit_are_refused_before_anything_is_written(studies, tmp_path):
    with pytest.raises(UserError, match="add --out FOLDER"):
        report.main(studies)
    with pytest.raises(UserError, match="--out is for several studies"):
        report.main([studies[0], "--out", str(tmp_path / "x")])
    lone = write_study(tmp_path, {"sit": "sit"}, seeds=(0,), study="lone")
    with pytest.raises(UserError, match="cells differs between a "):
        report.main([studies[0], str(lone), "--out", str(tmp_path / "x")])
    assert not (lone / "report").exists() and not (tmp_path / "x").exists()
