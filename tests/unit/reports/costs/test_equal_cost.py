"""The main metric at equal cost: linear in the clock's logarithm between evaluations, by hand; never read beyond."""

import math
import shutil
from statistics import fmean

import pandas as pd
import pytest

from reports.costs import clocks, equal_cost
from reports.costs.equal_cost import Reading, equal_costs, read_at, seconds_remarks, unequal_timing
from reports.figures.curves import clock_curves
from reports.references.curves import shipped
from reports.study.load import load_study
from tests.unit.reports.records_factory import MAIN, diverge, edit_lines, edit_manifest, fail, run_folder, write_study
from tests.unit.reports.table_files import table_files

SLOPES = {("sit", 0): 1.0, ("sit", 1): 2.0, ("repa", 0): 3.0, ("repa", 1): 3.5}
"""Metric per logarithm of training GFLOPs, in which it is straight."""

SIT, REPA = 2 * 3 * 0.0206 * 64, 2 * 3 * 0.0226 * 64
"""Training GFLOPs of a step: 64 images of 2 x 3 x (backbone + heads) GMACs."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A budget of 800 steps, evaluated every 100; the metric is a slope times the logarithm of the GFLOPs spent."""
    study = write_study(tmp_path_factory.mktemp("runs"), {"sit": "sit", "repa": "repa"})
    for (cell, seed), slope in SLOPES.items():
        set_metric(study, cell, seed, lambda line, slope=slope: slope * math.log(line["train_gflops"]))
    return study


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written, tmp_path / "digits")


def set_metric(study, cell, seed, value):
    folder = run_folder(study, cell, seed)
    lines = folder.lines("eval")
    folder.path.joinpath("eval.jsonl").unlink()
    for line in lines:
        folder.append("eval", {**line, "metrics": {MAIN: value(line)}})


def lines_of(*points):
    return [{"step": step, "train_seconds": clock, "metrics": {MAIN: value}} for step, clock, value in points]


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (2.0, Reading(10.0, (1, 1))),
        (2.0 * 2**0.25, Reading(9.0, (1, 2))),  # a quarter of the way from 10 to 6, on a scale of doublings
        (4.0, Reading(6.0, (2, 2))),
        (8.0, Reading(7.0, (2, 3))),  # 4, 8 and 16 are as far apart
        (1.9, None),
        (16.1, None),
    ],
)
def test_a_curve_is_read_between_neighbours_and_not_beyond(at, expected):
    found = read_at(lines_of((1, 2.0, 10.0), (2, 4.0, 6.0), (3, 16.0, 8.0)), MAIN, "train_seconds", at)
    assert (found and found.steps) == (expected and expected.steps)
    assert (found and found.value) == (expected and pytest.approx(expected.value, rel=1e-12))


def test_the_reference_curves_are_straighter_in_the_logarithm():
    """The distance after 315 steps, read off those after 210 and 420, for the 64 runs of the references: relative
    errors, which the README quotes, against those of a line that is straight in the clock."""
    logarithmic, straight = [], []
    for reference in shipped():
        curve = reference.curves["fd_efficientnet_lite0_898"]
        for seed, actual in curve[315].items():
            first, last = curve[210][seed], curve[420][seed]
            lines = [{"step": step, "metrics": {MAIN: value}} for step, value in ((210, first), (420, last))]
            logarithmic.append(read_at(lines, MAIN, "step", 315).value / actual - 1)
            straight.append((first + last) / 2 / actual - 1)
    assert len(logarithmic) == 64
    means = [fmean(errors) for errors in (logarithmic, straight)]
    sizes = [math.sqrt(fmean(error**2 for error in errors)) for errors in (logarithmic, straight)]
    assert [round(100 * value, 1) for value in (*means, *sizes)] == [1.6, 6.4, 2.7, 6.8]


def test_a_clock_that_stood_still_is_not_read_from():
    assert read_at(lines_of((1, 0.0, 10.0), (2, 4.0, 6.0)), MAIN, "train_seconds", 2.0) is None


def test_a_value_that_is_not_finite_gives_none_on_either_side():
    lines = lines_of((1, 2.0, 10.0), (2, 4.0, "nan"), (3, 6.0, 8.0))
    for at in (3.0, 4.0, 5.0):
        assert math.isnan(read_at(lines, MAIN, "train_seconds", at).value)
    assert read_at(lines, MAIN, "train_seconds", 6.0).value == 8.0


def test_equal_gflops_by_hand(path):
    study = load_study(path)
    gflops, seconds = equal_costs(study)
    # sit ends first: 800 of its steps cost as much as 729.2 of repa's.
    assert (gflops.unit.name, gflops.amount) == ("train_gflops", pytest.approx(800 * SIT))
    for (cell, seed), slope in SLOPES.items():
        assert gflops.results[cell].values[seed] == pytest.approx(slope * math.log(800 * SIT))
    assert gflops.steps == {"sit": (800, 800), "repa": (700, 800)}
    difference = gflops.results["repa"].difference
    assert difference.by_seed == pytest.approx({0: 2.0 * math.log(800 * SIT), 1: 1.5 * math.log(800 * SIT)})
    # t(1) at 97.5% is 12.7062; two values that are d apart have a half-width of 12.7062 d / 2.
    assert difference.interval.mean == pytest.approx(1.75 * math.log(800 * SIT))
    half = difference.interval.high - difference.interval.mean
    assert half == pytest.approx(12.7062 * 0.25 * math.log(800 * SIT), rel=1e-5)
    # 40 seconds are 800 steps of sit at 0.05 s, and 533.3 of repa at 0.075 s.
    assert (seconds.unit.name, seconds.amount) == ("seconds", pytest.approx(40.0))
    spent = math.log(40 / 0.075 * REPA)
    assert seconds.results["repa"].values == pytest.approx({0: 3.0 * spent, 1: 3.5 * spent})
    assert seconds.steps == {"sit": (800, 800), "repa": (500, 600)}


def test_the_table_and_its_texts(path):
    study = load_study(path)
    found = equal_costs(study)
    table = equal_cost.equal_cost_table(study, found).set_index(["unit", "cell"])
    repa = table.loc[("train_gflops", "repa")]
    assert (repa["from_step"], repa["to_step"], repa[f"{MAIN}_pairs"]) == (700, 800, 2)
    assert repa[MAIN] == pytest.approx(3.25 * math.log(800 * SIT))
    rows = equal_cost.table(study, found[0]).rows
    assert [row["from steps"] for row in rows] == ["800", "700 to 800"]
    assert rows[1]["reading"] == "not separated; better at 0 of 2 seeds"
    _, markdown, latex = table_files(clocks.section(study))[equal_cost.STEM]
    assert "# At 6,328 training GFLOPs" in markdown and "# At 40 training seconds" in markdown
    assert latex.count(r"\toprule") == 2 and "At 40 training seconds." in latex


def test_seconds_of_shared_devices_are_left_out(path):
    edit_manifest(run_folder(path, "repa", 1), shared_device=True)
    study = load_study(path)
    gflops, seconds = equal_costs(study)
    assert len(gflops.results["repa"].finite) == 2
    assert list(seconds.results["repa"].finite) == [0]
    assert seconds.results["repa"].absent == {1: "left out ‡"}
    assert seconds_remarks(study) == [
        "repa seed 1 shared its device with another run and is left out of training seconds."
    ]
    curves = clock_curves(study, MAIN)
    assert list(dict.fromkeys(curves["unit"])) == ["images", "train_gflops", "seconds"]
    last = curves[(curves["cell"] == "repa") & (curves["series"] == "mean") & (curves["point"] == 8)].set_index("unit")
    assert last["num_seeds"].to_dict() == {"images": 2, "train_gflops": 2, "seconds": 1}
    assert last["value"]["seconds"] == pytest.approx(3.0 * math.log(800 * REPA))
    assert last["value"]["images"] == pytest.approx(3.25 * math.log(800 * REPA))


def test_without_a_run_that_counts_there_are_no_seconds(path):
    for cell, seed in SLOPES:
        edit_manifest(run_folder(path, cell, seed), shared_device=True)
    study = load_study(path)
    assert [equal.unit.name for equal in equal_costs(study)] == ["train_gflops"]
    assert set(clock_curves(study, MAIN)["unit"]) == {"images", "train_gflops"}
    assert seconds_remarks(study) == [
        "Every run shared its device with another, so there are no training seconds to compare."
    ]


def test_seconds_of_unequal_machines_are_not_compared(path):
    edit_manifest(run_folder(path, "repa", 1), environment={"threads": 4})
    study = load_study(path)
    assert unequal_timing(study) == ["threads (2: sit seed 0, sit seed 1 and repa seed 0; 4: repa seed 1)"]
    assert [equal.unit.name for equal in equal_costs(study)] == ["train_gflops"]
    # Without its run there, the others are alike.
    edit_manifest(run_folder(path, "repa", 1), shared_device=True)
    assert [equal.unit.name for equal in equal_costs(load_study(path))] == ["train_gflops", "seconds"]


def test_runs_that_stopped_early_do_not_draw_the_others_back(path):
    diverge(run_folder(path, "repa", 1), 312, "base", kept=3)
    fail(run_folder(path, "sit", 1), "no memory")
    gflops = equal_costs(load_study(path))[0]
    assert gflops.amount == pytest.approx(800 * SIT)
    assert list(gflops.results["repa"].finite) == [0]
    assert gflops.results["repa"].absent == {1: "diverged"}
    assert gflops.results["sit"].absent == {1: "failed"}
    assert gflops.results["repa"].difference.by_seed == pytest.approx({0: 2.0 * math.log(800 * SIT)})


def test_while_no_run_is_finished_those_that_go_on_decide(path):
    for (cell, seed), kept in zip(SLOPES, (5, 6, 7, 8), strict=True):
        edit_manifest(run_folder(path, cell, seed), status="running")
        edit_lines(run_folder(path, cell, seed), "eval", keep=kept)
    gflops = equal_costs(load_study(path))[0]
    assert gflops.amount == pytest.approx(500 * SIT)
    assert all(len(result.finite) == 2 for result in gflops.results.values())


def test_a_cell_first_evaluated_later_has_no_value(path):
    for seed in (0, 1):
        folder = run_folder(path, "repa", seed)
        last = folder.lines("eval")[-1]
        folder.path.joinpath("eval.jsonl").unlink()
        folder.append("eval", last)
    study = load_study(path)
    gflops = equal_costs(study)[0]
    assert gflops.results["repa"].finite == {} and gflops.steps_text("repa") == "–"
    assert pd.isna(equal_cost.equal_cost_table(study, [gflops])["from_step"][1])
