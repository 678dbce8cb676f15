"""Cost to target: costs, speed-ups and intervals worked out by hand; misses, bounds and open runs are said aloud."""

import dataclasses
import math
import shutil

import pytest
from matplotlib.figure import Figure

from reports.costs import targets
from reports.costs.targets_costs import cell_costs, final_target, median_point
from reports.costs.targets_figure import cost_frame, costs_figure, plot_costs, stacked
from reports.figures.style import Look, cell_styles
from reports.study.load import load_study
from reports.study.units import UNITS
from tests.unit.reports.records_factory import (
    MAIN,
    diverge,
    edit_lines,
    edit_manifest,
    fail,
    run_folder,
    write_lines,
    write_study,
)
from tests.unit.reports.table_files import table_files

CURVES = {
    ("sit", 0): (90, 80, 70, 60, 50, 40, 30, 20),
    ("sit", 1): (92, 82, 72, 62, 52, 42, 32, 22),
    ("sit", 2): (94, 84, 74, 64, 54, 44, 34, 24),
    ("repa", 0): (80, 60, 40, 30, 21, 19, 18, 17),
    ("repa", 1): (80, 60, 40, 22, 23, 19, 18, 17),
    ("repa", 2): (80, 60, 40, 35, 30, 24, 22, 21),
}
"""The main metric at steps 100 to 800. The medians of sit are those of seed 1, so the target is 22: sit reaches it
after 800 steps at seeds 0 and 1, never at seed 2; repa after 500, 400 and 700 steps."""

GFLOPS = {"sit": 2 * 3 * 0.0206 * 64, "repa": 2 * 3 * 0.0226 * 64}
"""Training GFLOPs of a step: 64 images of 2 x 3 x (backbone + heads) GMACs."""

T2, T1 = 4.302653, 12.706205
"""Quantiles 0.975 of Student's t at 2 and 1 degrees of freedom."""


def write_curve(study, cell, seed, values, name=MAIN):
    folder = run_folder(study, cell, seed)
    lines = [{**line, "metrics": {name: v}} for line, v in zip(folder.lines("eval"), values, strict=False)]
    write_lines(folder, "eval", lines)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    study = write_study(tmp_path_factory.mktemp("runs"), {"sit": "sit", "repa": "repa"}, seeds=(0, 1, 2))
    for (cell, seed), values in CURVES.items():
        write_curve(study, cell, seed, values)
    return study


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written, tmp_path / "digits")


def final_costs(path, *asked):
    study = dataclasses.replace(load_study(path), targets=asked)
    target = targets.targets(study)[-1] if asked else final_target(study)
    return study, target, cell_costs(study, target)


def steps_of(cost):
    return {seed: each.cost(UNITS["steps"]) for seed, each in cost.outcomes.items()}


# -- targets and costs ------------------------------------------------------------------------------------------------


def test_the_target_is_the_median_of_the_baselines_last_values(path):
    study, target, (sit, repa) = final_costs(path)
    assert (target.metric, target.value, target.num_medians) == (MAIN, 22, 3)
    assert median_point(study, target) == 8
    assert steps_of(sit) == {0: 800, 1: 800, 2: math.inf}
    assert steps_of(repa) == {0: 500, 1: 400, 2: 700}
    assert sit.reached_text == "2 of 3 seeds"


def test_speedup_by_hand_on_every_clock(path):
    _, _, (_, repa) = final_costs(path)
    # sit takes 800; ratios 8/5, 8/4, 8/7, their logarithms' mean and half-width t s / sqrt(3).
    logs = [math.log(8 / 5), math.log(8 / 4), math.log(8 / 7)]
    mean = sum(logs) / 3
    half = T2 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2) / math.sqrt(3)
    for name, factor in (
        ("steps", 1),
        ("images", 1),
        ("train_gflops", GFLOPS["sit"] / GFLOPS["repa"]),
        ("seconds", 0.05 / 0.075),
    ):
        found = repa.clocks[name].speedup
        assert (found.num, found.mean) == (3, pytest.approx(factor * math.exp(mean)))
        assert (found.low, found.high) == pytest.approx(
            (factor * math.exp(mean - half), factor * math.exp(mean + half)), rel=1e-6
        )
        assert math.isnan(repa.clocks[name].paired.mean), "sit missed at seed 2"


def test_paired_speedup_by_hand(path):
    _, _, (sit, repa) = final_costs(path, 40.0)
    assert steps_of(sit) == {0: 600, 1: 700, 2: 700} and steps_of(repa) == {0: 300, 1: 300, 2: 300}
    logs = [math.log(2), math.log(7 / 3), math.log(7 / 3)]
    mean = sum(logs) / 3
    half = T2 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2) / math.sqrt(3)
    paired, speedup = repa.clocks["steps"].paired, repa.clocks["steps"].speedup
    assert (paired.num, paired.mean) == (3, pytest.approx(math.exp(mean)))
    assert (paired.low, paired.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)), rel=1e-6)
    assert speedup.mean == pytest.approx(7 / 3), "the median curve of sit is there after 700 steps"
    assert math.isnan(speedup.low), "all at one evaluation: no spread that would say anything"


def test_direction_is_the_metrics_own(path):
    for (cell, seed), values in CURVES.items():
        write_curve(path, cell, seed, [1 - value / 100 for value in values], "class_accuracy")
    _, target, (sit, repa) = final_costs(path)
    assert target.value == pytest.approx(0.78)
    assert steps_of(sit) == {0: 800, 1: 800, 2: math.inf}
    assert steps_of(repa) == {0: 500, 1: 400, 2: 700}


def test_a_value_that_is_not_finite_reaches_nothing(path):
    write_curve(path, "repa", 1, (80, 60, 40, "nan", "-inf", 19, 18, 17))
    _, _, (_, repa) = final_costs(path)
    assert steps_of(repa)[1] == 600


def test_a_diverged_run_is_a_miss_and_one_that_goes_on_is_open(path):
    diverge(run_folder(path, "repa", 2), 312, "base", kept=3)
    edit_manifest(run_folder(path, "repa", 1), status="running")
    edit_lines(run_folder(path, "repa", 1), "eval", keep=3)
    study, _, (_, repa) = final_costs(path)
    assert [each.kind for each in repa.outcomes.values()] == ["reached", "open", "missed"]
    assert repa.reached_text == "1 of 3 seeds; 1 unfinished"
    speedup = repa.clocks["steps"].speedup
    assert (speedup.num, speedup.mean) == (1, pytest.approx(1.6)) and math.isnan(speedup.low)
    assert targets.sentences(study) == [
        f"repa reached sit's final {MAIN} (22.00) at 1 of 3 seeds so far: 1 unfinished.",
    ]
    (row,) = [row for row in targets.section(study).parts[0].table.rows if row["cell"] == "repa"]
    assert row["steps at every seed"] == "500, unfinished, diverged"
    assert row["speed-up in steps and images [95%]"] == "1.60x, 1 of 3 seeds"


def test_a_run_that_failed_before_anything_was_recorded_is_open(path):
    fail(run_folder(path, "repa", 0), "no memory")
    _, _, (_, repa) = final_costs(path)
    assert repa.outcomes[0].kind == "open" and repa.outcomes[0].text(UNITS["steps"]) == "failed"
    assert math.isnan(repa.clocks["steps"].speedup.low)


def test_a_diverged_baseline_counts_as_the_worst_and_an_unfinished_one_not_at_all(path):
    diverge(run_folder(path, "sit", 0), 312, "base", kept=3)
    assert final_costs(path)[1].value == 24, "the median of 22, 24 and infinity"
    diverge(run_folder(path, "sit", 1), 312, "base", kept=3)
    assert final_target(load_study(path)) is None
    edit_manifest(run_folder(path, "sit", 1), status="running")
    edit_manifest(run_folder(path, "sit", 0), status="running")
    target = final_target(load_study(path))
    assert (target.value, target.num_medians) == (24, 1)


def test_at_the_first_evaluation_the_speedup_is_a_bound(path):
    write_curve(path, "repa", 0, (22,) * 8)
    study, _, (_, repa) = final_costs(path)
    assert repa.outcomes[0].text(UNITS["steps"]) == "≤ 100"
    assert math.isnan(repa.clocks["steps"].speedup.low)
    (row,) = [row for row in targets.section(study).parts[0].table.rows if row["cell"] == "repa"]
    assert row["speed-up in steps and images [95%]"].startswith("≥ 2.63x")  # cube root of 8 x 2 x 8/7
    (sentence,) = targets.sentences(study)
    assert "after at most 0.38x of its steps" in sentence and "first evaluation" in sentence


def test_a_target_that_the_baseline_has_from_the_start_gives_no_speedup(path):
    _, _, (_, repa) = final_costs(path, 95.0)
    assert math.isnan(repa.clocks["steps"].reference)
    assert math.isnan(repa.clocks["steps"].speedup.mean)


def test_a_target_that_the_baseline_never_reaches(path):
    study, _, (sit, repa) = final_costs(path, 18.5)
    assert [each.text(UNITS["steps"]) for each in sit.outcomes.values()] == ["> 800"] * 3
    assert math.isnan(repa.clocks["steps"].speedup.mean)
    assert steps_of(repa) == {0: 700, 1: 700, 2: math.inf}
    about, asked = targets.section(study).parts
    assert about.table.stem == "target" and asked.table.stem == "target_18.5"
    assert asked.sentences == [
        f"sit did not reach {MAIN} 18.50 within the budget at 3 of 3 seeds.",
        f"repa did not reach {MAIN} 18.50 within the budget at 1 of 3 seeds; at the 2 seeds that reached it, "
        "after 700 steps.",
    ]


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_runs_that_shared_their_device_have_no_seconds(path):
    edit_manifest(run_folder(path, "repa", 0), shared_device=True)
    study, _, (_, repa) = final_costs(path)
    assert list(repa.clocks["seconds"].outcomes) == [1, 2] and list(repa.clocks["steps"].outcomes) == [0, 1, 2]
    # 40 s over 30 s and 52.5 s: two values have a half-width of t(1) times half their distance.
    logs = (math.log(40 / 30), math.log(40 / 52.5))
    found = repa.clocks["seconds"].speedup
    assert found.high == pytest.approx(math.exp(sum(logs) / 2 + T1 * (logs[0] - logs[1]) / 2), rel=1e-5)
    (row,) = [row for row in targets.section(study).parts[0].table.rows if row["cell"] == "repa"]
    assert row["speed-up in training seconds [95%]"].endswith("], 2 of 3 seeds")


def test_without_comparable_seconds_the_clock_is_left_out(path):
    edit_manifest(run_folder(path, "repa", 1), environment={"threads": 4})
    study, _, (_, repa) = final_costs(path)
    assert list(repa.clocks) == ["steps", "images", "train_gflops"]
    assert any("not comparable" in note for note in targets.section(study).parts[0].table.notes)
    for seed in (0, 1, 2):
        edit_manifest(run_folder(path, "sit", seed), shared_device=True)
    assert list(final_costs(path)[2][1].clocks) == ["steps", "images", "train_gflops"]


# -- what is said -----------------------------------------------------------------------------------------------------


def test_the_sentence_holds_the_numbers_of_the_interval(path):
    study, _, (_, repa) = final_costs(path)
    found = repa.clocks["steps"].speedup
    (sentence,) = targets.sentences(study)
    share = f"{1 / found.mean:.2f}x [{1 / found.high:.2f}, {1 / found.low:.2f}] of its steps"
    assert share == "0.65x [0.32, 1.31] of its steps"
    assert sentence.startswith(f"repa reached sit's final {MAIN} (22.00) after {share} and ")
    assert sentence.endswith(" of its training GFLOPs, 3 seeds; not separated in steps and training GFLOPs.")


def test_an_interval_below_one_is_said_without_reserve(path):
    for seed, step in enumerate((3, 3, 4)):
        write_curve(path, "repa", seed, [80] * step + [20] * (8 - step))
    (sentence,) = targets.sentences(load_study(path))
    # 400, 400 and 500 of 800 steps: 0.54 [0.39, 0.74].
    assert "after 0.54x [0.39, 0.74] of its steps" in sentence and sentence.endswith("training GFLOPs, 3 seeds.")


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    study = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0,))
    for cell in ("sit", "repa"):
        write_curve(study, cell, 0, CURVES[cell, 0])
    (sentence,) = targets.sentences(load_study(study))
    assert "after 0.75x of its steps" in sentence and sentence.endswith(", 1 seed: one seed, so there is no interval.")


def test_many_cells_are_not_all_spoken_of(tmp_path):
    study = write_study(tmp_path, {"sit": "sit"} | {f"repa{i}": "repa" for i in range(8)}, seeds=(0,))
    found = targets.sentences(load_study(study))
    assert len(found) == 7 and found[-1] == "2 more cells: in the table of costs to target."


def test_the_section_says_what_the_target_is_and_its_tables_hold_every_run(path):
    study = dataclasses.replace(load_study(path), targets=(40.0,))
    section = targets.section(study)
    assert section.sentences == [
        f"The target is {MAIN} 22.00, the median of sit over 3 seeds after 800 steps, which sit itself reached at "
        "2 of 3 seeds."
    ]
    assert [plan.stem for plan in section.plans] == ["target", "target_40"]
    sit, repa = section.parts[0].table.numbers
    assert (sit["steps_seed2"], sit["num_missed"], repa["num_reached"]) == (math.inf, 1, 3)
    assert repa["images_seed1"] == 400 * 64 and repa["images_baseline"] == 800 * 64
    assert repa["train_gflops_speedup"] == pytest.approx(repa["steps_speedup"] * GFLOPS["sit"] / GFLOPS["repa"])
    assert section.parts[0].table.rows[0]["steps at every seed"] == "800, 800, > 800"
    _, _, latex = table_files(section)["target"]
    assert "> 800" not in latex and r"\textgreater{} 800" in latex


def test_without_a_baseline_or_other_cells_there_is_nothing_to_say(tmp_path):
    alone = load_study(write_study(tmp_path / "a", {"sit": "sit"}))
    assert targets.section(alone) is None
    assert [block.table.stem for block in targets.section(dataclasses.replace(alone, targets=(50.0,))).parts] == [
        "target",
        "target_50",
    ]
    headless = load_study(write_study(tmp_path / "b", {"repa": "repa", "sra": "sra"}, baseline=""))
    assert targets.section(headless) is None and targets.sentences(headless) == []
    asked = targets.section(dataclasses.replace(headless, targets=(50.0,)))
    assert list(asked.parts[0].table.rows[0]) == ["cell", "reached", "steps at every seed"]


# -- the figure -------------------------------------------------------------------------------------------------------


def test_the_figure_shows_every_seed_the_interval_and_the_misses(path):
    study, target, costs = final_costs(path)
    frame = cost_frame(target.metric, target.value, costs)
    look = Look(cell_styles(study.cells, study.baseline))
    ax = plot_costs(Figure().subplots(), frame[frame["unit"] == "steps"], look)
    dots = {line.get_color(): line for line in ax.lines if line.get_marker() == "o"}
    assert dots[look.colour("repa")].get_xdata().tolist() == [500, 400, 700]
    assert dots[look.colour("sit")].get_xdata().tolist() == [800, 800]
    assert len(set(dots[look.colour("sit")].get_ydata())) == 2, "equal costs do not hide each other"
    (interval,) = [line for line in ax.lines if line.get_linewidth() == 2 and line.get_color() == look.colour("repa")]
    speedup = costs[1].clocks["steps"].speedup
    assert list(interval.get_xdata()) == pytest.approx([800 / speedup.high, 800 / speedup.low])
    (miss,) = [line for line in ax.lines if line.get_marker() == ">"]
    assert miss.get_color() == look.colour("sit") and [text.get_text() for text in ax.texts] == ["1"]
    (reference,) = [line for line in ax.lines if line.get_color() == look.theme.muted]
    assert list(reference.get_xdata()) == [800, 800]
    assert len(costs_figure(frame, look).axes) == 4


def test_dots_that_would_hide_each_other_are_a_pile():
    assert stacked([5.0, 1.0, 5.1, 9.0], 0.5) == pytest.approx([0.1, 0.0, -0.1, 0.0])
    pile = stacked([1.0] * 15, 0.5)
    assert pile[0] == pytest.approx(0.35) and pile[-1] == pytest.approx(-0.35) and len(set(pile)) == 15
