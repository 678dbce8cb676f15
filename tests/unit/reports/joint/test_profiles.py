"""Studies put together: profiles, changes and probabilities by hand; what does not go together is refused."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from harness.records.files import digest
from harness.records.run_folder import UserError
from reports.costs.targets_costs import cell_costs, final_target
from reports.figures.style import Look, cell_styles
from reports.joint import profiles
from reports.joint import report as joint
from reports.joint.profiles_figure import plot_profiles, profiles_figure
from reports.study.load import load_study
from tests.unit.reports.page_reader import Page
from tests.unit.reports.records_factory import (
    MAIN,
    diverge,
    edit_manifest,
    run_folder,
    set_values,
    write_lines,
    write_run,
    write_study,
)

CELLS = {"sit": "sit", "repa": "repa"}


def write_setting(folder, name, seeds):
    """A study on data of its own, both cells' curves to be set."""
    study = write_study(folder, CELLS, seeds=seeds, study=name)
    for run in study.glob("*/seed*"):
        edit_manifest(run_folder(study, run.parent.name, int(run.name[4:])), digests={"data": digest(name)})
    return study


def write_hits(study, cell, *steps):
    """The main metric falls from 90 to 10 at the given step of each seed, and never where it is 0."""
    for seed, step in enumerate(steps):
        folder = run_folder(study, cell, seed)
        lines = folder.lines("eval")
        values = [10.0 if 0 < step <= line["step"] else 90.0 for line in lines]
        write_lines(folder, "eval", [{**line, "metrics": {MAIN: v}} for line, v in zip(lines, values, strict=True)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two settings of two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [write_setting(folder, name, (0, 1)) for name in ("a", "b")]
    write_hits(paths[0], "sit", 400, 800)
    write_hits(paths[0], "repa", 200, 0)
    write_hits(paths[1], "sit", 400, 400)
    write_hits(paths[1], "repa", 400, 800)
    return paths


@pytest.fixture
def paths(written, tmp_path):
    return [shutil.copytree(path, tmp_path / path.name) for path in written]


def load(paths):
    return [load_study(path) for path in paths]


# -- profiles ---------------------------------------------------------------------------------------------------------


def profile(paths):
    costs = {study.name: cell_costs(study, final_target(study)) for study in load(paths)}
    return profiles.profile_frame(costs)


def shares(frame, unit):
    own = frame[frame["unit"] == unit]
    return {cell: dict(zip(rows["ratio"], rows["share"], strict=True)) for cell, rows in own.groupby("cell")}


def test_profiles_by_hand(paths):
    frame = profile(paths)
    # Steps of sit and repa at the four problems: 400 and 200, 800 and a miss, 400 and 400, 400 and 800.
    assert shares(frame, "steps") == {"sit": {1.0: 0.75, 2.0: 1.0}, "repa": {1.0: 0.5, 2.0: 0.75}}
    # A step of repa costs q times as much: ratios 2/q and 1, 1 and a miss, 1 and q, 1 and 2q.
    q = 0.0226 / 0.0206
    gflops = shares(frame, "train_gflops")
    assert list(gflops["sit"]) == pytest.approx([1, q, 2 / q, 2 * q])
    assert list(gflops["sit"].values()) == [0.75, 0.75, 1.0, 1.0]
    assert list(gflops["repa"].values()) == [0.25, 0.5, 0.5, 0.75]
    assert set(frame["num_problems"]) == {4}


def test_a_problem_that_is_open_is_left_out_and_one_that_nobody_solves_is_not(paths):
    edit_manifest(run_folder(paths[0], "repa", 1), status="running")
    frame = profile(paths)
    assert set(frame["num_problems"]) == {3}
    assert shares(frame, "steps")["sit"] == pytest.approx({1.0: 2 / 3, 2.0: 1.0})
    edit_manifest(run_folder(paths[0], "repa", 1), status="finished")
    # In b nobody falls at seed 1: its target is the median of 10 and 90, and the misses there count.
    write_hits(paths[1], "sit", 400, 0)
    write_hits(paths[1], "repa", 400, 0)
    frame = profile(paths)
    assert set(frame["num_problems"]) == {4}
    assert shares(frame, "steps") == {"sit": {1.0: 0.5, 2.0: 0.75}, "repa": {1.0: 0.5, 2.0: 0.5}}


def test_seconds_of_shared_devices_leave_their_problem_out(paths):
    edit_manifest(run_folder(paths[1], "repa", 0), shared_device=True)
    found = profile(paths).drop_duplicates("unit").set_index("unit")["num_problems"]
    assert found.to_dict() == {"steps": 4, "train_gflops": 4, "seconds": 3}


def test_a_study_without_a_target_is_named(paths):
    for seed in (0, 1):
        diverge(run_folder(paths[0], "sit", seed), 312, "base", kept=3)
    (section,) = [each for each in profiles.sections(load(paths)) if each.name == "profiles"]
    assert section.sentences[-1] == "a has no target, as its sit has no final value, and no part in them."
    for seed in (0, 1):
        diverge(run_folder(paths[1], "sit", seed), 312, "base", kept=3)
    assert [each.name for each in profiles.sections(load(paths))] == ["overall", "differences", "settings"]


def test_the_figure_steps_where_shares_rise(paths):
    frame = profile(paths)
    look = Look(cell_styles(["sit", "repa"], "sit"))
    ax = plot_profiles(Figure().subplots(), frame[frame["unit"] == "train_gflops"], look)
    sit, repa = ax.lines
    assert sit.get_drawstyle() == "steps-post"
    assert list(sit.get_ydata()) == [0.75, 1.0, 1.0] and list(repa.get_ydata()) == [0.25, 0.5, 0.75, 0.75]
    assert ax.get_xscale() == "linear" and ax.get_xlim()[0] == 1
    far = frame.assign(ratio=frame["ratio"] ** 4)
    assert plot_profiles(Figure().subplots(), far[far["unit"] == "steps"], look).get_xscale() == "log"
    assert len(profiles_figure(frame, look).axes) == 3


# -- over all settings ------------------------------------------------------------------------------------------------


def test_change_and_improvement_by_hand(paths):
    set_values(paths[0], "sit", 10.0, 20.0)
    set_values(paths[0], "repa", 5.0, 40.0)  # half and twice: no change
    set_values(paths[1], "sit", 100.0, 100.0)
    set_values(paths[1], "repa", 25.0, 100.0)  # a quarter and as much: half
    found = profiles.overall(load(paths), "repa")
    assert found.change.mean == pytest.approx(100 * (math.sqrt(0.5) - 1))
    assert found.improvement.mean == pytest.approx((0.5 + 0.75) / 2)
    assert (found.change.num, found.improvement.num) == (4, 4)
    assert math.isnan(found.change.low), "four pairs are too few"
    diverge(run_folder(paths[1], "repa", 0), 312, "base", kept=3)
    lost = profiles.overall(load(paths), "repa")
    assert (lost.change.num, lost.improvement.num) == (3, 4)
    assert lost.improvement.mean == pytest.approx((0.5 + 0.25) / 2)


def test_with_enough_seeds_there_is_an_interval_and_it_is_the_same_each_time(tmp_path):
    paths = [write_setting(tmp_path, name, range(5)) for name in ("a", "b")]
    for path in paths:
        set_values(path, "sit", 10.0, 11.0, 12.0, 13.0, 14.0)
        set_values(path, "repa", 9.0, 9.5, 11.0, 12.5, 13.0)
    studies = load(paths)
    found = profiles.overall(studies, "repa").change
    ratios = np.log(np.array([9.0, 9.5, 11.0, 12.5, 13.0]) / np.array([10.0, 11.0, 12.0, 13.0, 14.0]))
    # The mean of ten draws is nearly normal: s / sqrt(10) with n in the denominator of s, 1.96 of them each way.
    half = 1.96 * ratios.std() / math.sqrt(10)
    assert found.mean == pytest.approx(100 * math.expm1(ratios.mean()))
    assert found.low == pytest.approx(100 * math.expm1(ratios.mean() - half), abs=0.35)
    assert found.high == pytest.approx(100 * math.expm1(ratios.mean() + half), abs=0.35)
    assert profiles.overall(load(paths), "repa").change == found
    first, second = profiles.headline(studies)
    assert first == "2 settings of one comparison: a and b; 1 cell against sit."
    show = f"repa −{-found.mean:.1f}% [−{-found.low:.1f}, −{-found.high:.1f}]"
    assert second == f"Change of fd_efficientnet_lite0 against sit, over seeds and settings: {show}."


# -- what goes together -----------------------------------------------------------------------------------------------


def refused(paths):
    with pytest.raises(UserError) as error:
        profiles.check_together(load(paths))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_cells_methods_baselines_metrics_and_names_are_refused(paths):
    write_run(paths[1].parent, "b", "sra", "sra", 0, "sit")
    assert refused(paths).startswith("cells differs between a (repa and sit) and b (repa, sit and sra): ")
    shutil.rmtree(paths[1] / "sra")
    for seed in (0, 1):
        edit_manifest(run_folder(paths[1], "repa", seed), method="sra")
    assert "method differs between a (repa: repa and sit: sit) and b (repa: sra and sit: sit)" in refused(paths)
    for seed in (0, 1):
        edit_manifest(run_folder(paths[1], "repa", seed), method="repa", baseline="repa")
        edit_manifest(run_folder(paths[1], "sit", seed), baseline="repa")
    assert "baseline differs between a (sit) and b (repa)" in refused(paths)
    twin = shutil.copytree(paths[0], paths[0].parent / "other" / "a")
    assert refused([paths[0], twin]).startswith("two studies are named a: ")


def test_one_setting_twice_is_refused(paths):
    twin = shutil.copytree(paths[0], paths[0].parent / "c")
    assert "a and c have one setting (data, size and training agree)" in refused([paths[0], twin])


def test_another_metric_is_refused_but_not_another_number_of_samples(paths):
    for name, is_refused in (("fd_efficientnet_lite0_5k", False), ("fid50k", True)):
        for run in paths[1].glob("*/seed*"):
            folder = run_folder(paths[1], run.parent.name, int(run.name[4:]))
            lines = [{**line, "metrics": {name: next(iter(line["metrics"].values()))}} for line in folder.lines("eval")]
            write_lines(folder, "eval", lines)
        if is_refused:
            assert "main metric differs between a (fd_efficientnet_lite0) and b (fid)" in refused(paths)
        else:
            profiles.check_together(load(paths))


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_joint_report_is_whole(paths, tmp_path):
    studies = load(paths)
    out = tmp_path / "joint"
    written = joint.write_joint(studies, [path / "report" / "index.html" for path in paths], out)
    assert written == out / "index.html"
    tables = ("overall", "differences", "settings")
    assert {path.name for path in out.iterdir()} == {
        *(f"{stem}.{kind}" for stem in tables for kind in ("csv", "md", "tex")),
        *("index.html", "figures", "joint.json"),
    }
    page = Page(written.read_text())
    text = " ".join("".join(page.text).split())
    assert text.startswith("a and b: several settings together")
    links = [href for href in page.attributes("a", "href") if href.startswith("../")]
    assert links == ["../a/report/index.html", "../b/report/index.html"]
    for href in page.attributes("a", "href"):
        assert href.startswith(("#", "../")) or (out / href).is_file()
    table = pd.read_csv(out / "differences.csv").set_index(["study", "cell"])
    assert table.loc[("a", "repa"), "value_difference"] == pytest.approx((0 + 80) / 2)
    assert table.loc[("b", "repa"), "baseline_mean"] == 10
    assert [row["study"] for row in json.loads((out / "joint.json").read_text())] == ["a", "b"]
    joint.write_joint(studies, [path / "report" / "index.html" for path in paths], out)


def test_a_folder_with_other_files_is_not_replaced(paths, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, words in (("mine", "holds other files"), ("file", "is a file")):
        with pytest.raises(UserError, match=words):
            joint.write_joint(load(paths), paths, tmp_path / folder)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
