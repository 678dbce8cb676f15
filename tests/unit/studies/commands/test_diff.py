"""`ditbench diff`: what differs between two runs, and whether they may be compared."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.records.run_folder import RunFolder
from reports.study.contrast import Contrast, contrast
from reports.study.load import load_run
from studies import cli
from tests.unit.reports.records_factory import MAIN, edit_lines, edit_manifest, fail, run_folder, write_study

ROOT = Path(__file__).parents[4]
CELLS = {"sit": "sit", "repa": "repa", "other": "repa"}
OTHER = "0" * 64


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"), CELLS)


@pytest.fixture
def study(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "digits"))


@pytest.fixture
def between(study) -> Callable[..., Contrast]:
    """`between(cell, seed=0, against="sit")`: two runs of the study, as they stand."""

    def compare(cell: str, seed: int = 0, against: str = "sit") -> Contrast:
        return contrast(load_run(run_folder(study, against, 0)), load_run(run_folder(study, cell, seed)))

    return compare


def edit_config(folder: RunFolder, section: str, **fields: Any) -> None:
    config = folder.manifest()["config"]
    config[section] |= fields
    edit_manifest(folder, config=config)


def test_a_run_does_not_differ_from_itself(between):
    found = between("sit")
    assert list(found.differences) == []
    assert found.verdict == "comparable, paired by seed: all that must agree does"
    assert found.trace is not None and (found.trace.step, found.trace.agrees) == (800, True)


def test_two_methods_differ_where_they_may(between):
    found = between("repa")
    assert found.is_comparable and found.is_paired
    fields = {(d.group, d.field): (d.a, d.b) for d in found.differences}
    assert fields["config", "method"] == ("sit", "repa")
    assert fields["config", "sections.repa.block"] == (None, 2)
    assert fields["method", "head_parameters"] == (0, 506_240)
    assert fields["digests", "encoder/efficientnet_lite2"][0] is None
    assert not any(d.must_agree for d in found.differences)
    assert {d.group for d in found.differences} == {"config", "digests", "method"}


def test_runs_at_two_seeds_are_comparable_and_not_paired(between):
    found = between("repa", seed=1)
    assert found.is_comparable and not found.is_paired
    assert found.verdict.startswith("comparable, but not paired: the seeds are 0 and 1")
    assert found.trace is not None and not found.trace.agrees
    (weights,) = [d for d in found.differences if d.field == "initial_weights"]
    assert not weights.must_agree


@pytest.mark.parametrize("name", ["data", "autoencoder", "training", "evaluation", "initial_weights"])
def test_a_digest_that_must_agree_is_an_obstacle(study, between, name):
    edit_manifest(run_folder(study, "repa", 0), digests={name: OTHER})
    found = between("repa")
    assert f"{name.replace('_', ' ')} digest differs" in found.obstacles
    assert found.verdict.startswith("not comparable: ")
    assert [d.field for d in found.differences if d.must_agree] == [name]


def test_the_fields_behind_an_obstacle_are_marked(study, between):
    folder = run_folder(study, "repa", 0)
    edit_config(folder, "optimizer", lr=0.1, micro_batch=8)
    edit_config(folder, "runtime", precision="fp32", threads=9)
    edit_manifest(folder, digests={"training": OTHER}, model={"parameters": 5})
    found = between("repa")
    marked = {d.field for d in found.differences if d.must_agree}
    assert marked == {"optimizer.lr", "runtime.precision", "training", "model.parameters"}
    assert {"optimizer.micro_batch", "runtime.threads"} <= {d.field for d in found.differences} - marked
    assert found.verdict == "not comparable: size differs, precision differs, training digest differs"


def test_fields_of_the_protocol_are_marked(study, between):
    folder = run_folder(study, "repa", 0)
    sampler = {**folder.manifest()["protocol"]["sampler"], "num_steps": 25}
    edit_manifest(folder, protocol={"sampler": sampler}, digests={"evaluation": OTHER})
    marked = {d.field: (d.a, d.b) for d in between("repa").differences if d.must_agree}
    assert marked["protocol.sampler.num_steps"] == (50, 25)


def test_an_encoder_of_both_must_be_one_file(study, between):
    edit_manifest(run_folder(study, "other", 0), digests={"encoder/efficientnet_lite2": OTHER})
    assert between("other", against="repa").obstacles == ["encoder/efficientnet_lite2 digest differs"]


@pytest.mark.parametrize(("field", "value"), [("git_dirty", True), ("threads", 8), ("packages", {"torch": "2.9.0"})])
def test_another_environment_is_shown_and_allowed(study, between, field, value):
    edit_manifest(run_folder(study, "repa", 0), environment={field: value})
    found = between("repa")
    assert any(d.group == "environment" and d.field.startswith(field) for d in found.differences)
    assert found.is_comparable


def test_traces_are_compared_at_the_last_common_step(study, between):
    folder = run_folder(study, "repa", 0)
    edit_lines(folder, "train", keep=5)
    found = between("repa")
    assert found.trace is not None and (found.trace.step, found.trace.agrees) == (100, True)
    edit_lines(folder, "train", keep=4, trace="f" * 64)
    found = between("repa")
    assert found.trace is not None and (found.trace.step, found.trace.first_different) == (80, 80)
    assert found.verdict == "not comparable: batch trace differs from step 80 on"


def test_evaluations_under_another_protocol_are_an_obstacle(study, between):
    edit_lines(run_folder(study, "repa", 0), "eval", keep=3, protocol=OTHER)
    assert between("repa").obstacles == [
        "repa seed 0 was evaluated at step 300 under another protocol than its manifest's"
    ]


def test_seconds_of_a_shared_device_are_an_obstacle(tmp_path):
    study = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0,), unit="seconds", amount=12)
    edit_manifest(run_folder(study, "repa", 0), shared_device=True)
    a, b = (load_run(run_folder(study, cell, 0)) for cell in ("sit", "repa"))
    assert contrast(a, b).obstacles == ["repa seed 0 shared its device, and the budget is in seconds"]


def test_what_a_failed_run_never_recorded_is_unknown(study, between):
    fail(run_folder(study, "repa", 0), "no memory")
    found = between("repa")
    assert not found.is_comparable and found.trace is None
    assert found.verdict.startswith("cannot be told: not recorded by both runs: data digest, autoencoder digest, size")


def test_runs_of_two_studies_are_compared(study, tmp_path):
    other = write_study(tmp_path, {"sit": "sit"}, seeds=(0,), study="second", amount=400)
    found = contrast(load_run(run_folder(study, "sit", 0)), load_run(run_folder(other, "sit", 0)))
    assert found.obstacles == ["training digest differs"]
    marked = {d.field: (d.a, d.b) for d in found.differences if d.must_agree and d.group == "config"}
    assert marked == {"budget.amount": (800, 400)}


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_groups_trace_and_verdict(study, capsys):
    edit_config(run_folder(study, "repa", 0), "optimizer", lr=0.1)
    edit_manifest(run_folder(study, "repa", 0), digests={"training": OTHER}, environment={"device": "a\nb\u202e"})
    paths = [str(study / cell / "seed0") for cell in ("sit", "repa")]
    assert cli.main(["diff", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A  {paths[0]}", f"B  {paths[1]}"]
    split = [line.split() for line in lines]
    assert ["optimizer.lr", "0.0015", "0.1", "must", "agree"] in split
    digest = run_folder(study, "sit", 0).manifest()["digests"]["training"]
    assert ["training", digest[:12], OTHER[:12], "must", "agree"] in split
    assert ["device", "cpu", "x86_64", "a", "b"] in split
    assert [words[0] for words in split if words[1:] == ["A", "B"]] == ["config", "environment", "digests", "method"]
    assert lines[-2:] == [
        "batch trace: equal to step 800, the last that both logged",
        "not comparable: training digest differs",
    ]


def test_the_command_as_json_holds_whole_values(study, capsys):
    edit_manifest(run_folder(study, "repa", 0), digests={"data": OTHER})
    assert cli.main(["diff", str(study / "sit/seed0"), str(study / "repa/seed0"), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (data,) = [d for d in found["differences"] if d["must_agree"]]
    assert data == {
        "group": "digests",
        "field": "data",
        "a": run_folder(study, "sit", 0).manifest()["digests"]["data"],
        "b": OTHER,
        "must_agree": True,
    }
    assert (found["comparable"], found["paired"], found["obstacles"]) == (False, True, ["data digest differs"])
    assert found["trace"] == {"step": 800, "agrees": True, "first_different": None}
    assert found["runs"] == {"a": str(study / "sit/seed0"), "b": str(study / "repa/seed0")}


@pytest.mark.parametrize("other", ["", "sit", "nowhere/seed0"])
def test_what_is_no_run_is_refused(study, capsys, other):
    assert cli.main(["diff", str(study / "sit" / "seed0"), str(study / other)]) == 2
    assert "manifest.json is missing: is this a run folder" in capsys.readouterr().err


def test_one_run_alone_is_refused(study, capsys):
    assert cli.main(["diff", str(study / "sit" / "seed0")]) == 2
    assert "diff: the following arguments are required: run_b" in capsys.readouterr().err


def test_the_command_starts_without_torch_and_pandas(study):
    code = (
        "import sys\nfrom studies.cli import main\n"
        "assert main(['diff', *sys.argv[1:]]) == 0\n"
        "heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'mlflow'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    paths = [str(study / cell / "seed0") for cell in ("sit", "repa")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "comparable, paired by seed" in result.stdout
    assert MAIN not in result.stdout
