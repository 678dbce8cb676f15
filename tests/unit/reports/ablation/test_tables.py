"""Tables and sentences of an ablation against values worked out by hand, for complete and for partial studies."""

import csv
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest

from harness.records.files import write_json
from harness.records.run_folder import UserError
from reports.ablation import findings as ablation_findings
from reports.ablation import report as ablation_report
from reports.ablation.tables import saved, search_table, terminal_tables
from reports.ablation.tables import tables as ablation_tables
from reports.ablation.trials import duplicates, load_ablation, num_runs
from reports.figures.curves import metric_curves
from reports.result import findings
from reports.setup import methods
from reports.study.endings import endings
from reports.study.load import load_study
from reports.study.verify import verify
from reports.tables import results
from tests.unit.reports.records_factory import (
    MAIN,
    diverge,
    edit_lines,
    edit_manifest,
    edit_trial,
    fail,
    prune,
    run_folder,
    set_values,
    write_ablation,
    write_study,
)
from tests.unit.reports.table_files import table_files

T = 12.706205
"""Quantile of Student's t at 97.5% with one degree of freedom, from a table."""

DEFAULTS = {"block": 1, "head_layers": 5}
GRID = [
    DEFAULTS,
    *({"block": b, "head_layers": h} for b, h in itertools.product((1, 2, 3), (2, 5)) if (b, h) != (1, 5)),
]
VALUES = {
    "sit": (30.0, 34.0),
    "vae_repa": (20.0, 24.0),
    "vae_repa,head_layers=2": (26.0, 28.0),
    "vae_repa,block=2": (17.0, 22.0),
    "vae_repa,block=2,head_layers=2": (21.0, 21.0),
    "vae_repa,block=3": (25.0, 31.0),
    "vae_repa,block=3,head_layers=2": (16.0, 18.0),
}
"""The main metric at seeds 0 and 1."""


def load(study: Path):
    found = load_ablation(load_study(study))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def grid_path(tmp_path_factory):
    study = write_ablation(tmp_path_factory.mktemp("runs"), GRID, DEFAULTS)
    for cell, values in VALUES.items():
        set_values(study, cell, *values)
    return study


@pytest.fixture(scope="module")
def grid(grid_path):
    return load(grid_path)


@pytest.fixture
def copied(grid_path, tmp_path):
    """A copy of the grid's study that a test may change."""
    return Path(shutil.copytree(grid_path, tmp_path / "blocks"))


# -- grids ----------------------------------------------------------------------------------------------------------


def test_an_axis_has_a_row_for_the_control_and_for_every_level_with_the_others_at_their_default(grid):
    block, heads = ablation_tables(grid)
    assert (block.stem, heads.stem) == ("axis_block", "axis_head_layers")
    assert block.title == "block of vae_repa, with head_layers = 5"
    assert [list(row.values()) for row in block.rows] == [
        # differences 10, 10; the sample standard deviation of 30 and 34 is sqrt(8)
        ["sit", "32.00", "2.83", "2", "30.00, 34.00", "+10.00 [+10.00, +10.00]", "worse, 0 of 2 better", "–"],
        ["1 (default)", "22.00", "2.83", "2", "20.00, 24.00", "–", "default", "24.50 (2)"],
        # differences -3, -2: mean -2.5, half-width 12.7062 * 0.7071 / sqrt(2) = 6.35
        [
            "2",
            "19.50",
            "3.54",
            "2",
            "17.00, 22.00",
            "−2.50 [−8.85, +3.85]",
            "not separated, 2 of 2 better",
            "20.25 (2)",
        ],
        [
            "3",
            "28.00",
            "4.24",
            "2",
            "25.00, 31.00",
            "+6.00 [−6.71, +18.71]",
            "not separated, 0 of 2 better",
            "22.50 (2)",
        ],
    ]
    # (22 + 19.5 + 28) / 3 and (27 + 21 + 17) / 3
    assert [row["mean over block"] for row in heads.rows] == ["–", "21.67 (3)", "23.17 (3)"]
    assert [row["head_layers"] for row in heads.rows] == ["sit", "2", "5 (default)"]


def test_numbers_hold_what_the_text_says(grid):
    level = ablation_tables(grid)[0].numbers[2]
    assert (level["axis"], level["level"], level["is_default"], level["cell"]) == (
        "block",
        "2",
        False,
        "vae_repa,block=2",
    )
    assert level["mean"] == 19.5 and level["spread"] == pytest.approx(math.sqrt(12.5))
    assert (level["n"], level["pairs"], level["seeds_better"], level["reading"]) == (2, 2, 2, "not separated")
    half = T * math.sqrt(0.5) / math.sqrt(2)
    assert (level["low"], level["high"]) == pytest.approx((-2.5 - half, -2.5 + half), abs=1e-5)
    assert (level["seed0"], level["seed1"], level["mean_over_others"]) == (17.0, 22.0, 20.25)


def test_values_of_a_record_are_not_used(grid_path, grid):
    recorded = {trial["value"] for trial in json.loads((grid_path / "ablation.json").read_text())["trial_list"]}
    assert recorded == {1e9}
    assert {grid.result(trial.cell, "vae_repa").mean for trial in grid.trials} == {22.0, 27.0, 19.5, 21.0, 28.0, 17.0}


def test_a_level_without_a_setting_is_not_asked_for_and_means_over_others_need_every_value(copied):
    record = json.loads((copied / "ablation.json").read_text())
    record["trial_list"] = [t for t in record["trial_list"] if t["cell"] != "vae_repa,block=3"]
    (copied / "ablation.json").write_text(json.dumps(record))
    shutil.rmtree(copied / "vae_repa,block=3")
    shutil.rmtree(copied / "vae_repa,block=2,head_layers=2")
    block, _ = ablation_tables(load(copied))
    assert list(block.rows[-1].values()) == ["3", "–", "–", "–", "not asked for", "–", "–", "17.00 (1)"]
    assert [row["mean over head_layers"] for row in block.rows] == ["–", "24.50 (2)", "–", "17.00 (1)"]


def test_axes_varied_in_turn_make_one_table_as_in_papers(tmp_path):
    defaults = {"block": 1, "loss": "smooth_l1", "weight": 0.5}
    settings = [defaults, *({**defaults, **change} for change in ({"block": 3}, {"loss": "l2"}, {"weight": 1.0}))]
    study = write_ablation(tmp_path, settings, defaults, kind="one_at_a_time", seeds=(0,))
    for cell, value in zip(("sit", "vae_repa", "vae_repa,block=3", "vae_repa,loss=l2"), (30, 20, 17, 20), strict=True):
        set_values(study, cell, float(value))
    set_values(study, "vae_repa,weight=1.0", 25.0)
    (table,) = ablation_tables(load(study))
    assert [(row["axis"], row["level"]) for row in table.rows] == [
        ("sit", ""),
        ("default", "block = 1, loss = smooth_l1, weight = 0.5"),
        ("block", "3"),
        ("loss", "l2"),
        ("weight", "1.0"),
    ]
    assert [(row["mean"], row["reading"]) for row in table.rows] == [
        ("30.00", "no interval, 0 of 1 better"),
        ("20.00", "default"),
        ("17.00", "no interval, 1 of 1 better"),
        ("20.00", "no interval, 0 of 1 better"),
        ("25.00", "no interval, 0 of 1 better"),
    ]
    assert [row["spread"] for row in table.rows] == ["–"] * 5
    assert [(n["axis"], n["level"]) for n in table.numbers[1:4]] == [
        ("block", "1"),
        ("block", "3"),
        ("loss", "smooth_l1"),
    ]


def test_tables_for_a_terminal(grid_path, grid):
    assert terminal_tables(grid_path) == [(table.title, list(table.rows)) for table in ablation_tables(grid)]


def test_a_comparison_has_no_tables_of_an_ablation(tmp_path):
    study = write_study(tmp_path, {"sit": "sit"}, seeds=(0,))
    assert load_ablation(load_study(study)) is None
    with pytest.raises(UserError, match=r"digits is no ablation: give the study of `ditbench ablate`"):
        terminal_tables(study)


def test_files_hold_the_same_table_in_three_formats(grid):
    numbers, markdown, latex = table_files(ablation_report.section(grid))["axis_block"]
    assert numbers["mean"].tolist() == [32.0, 22.0, 19.5, 28.0]
    assert "| 2 | 19.50 | 3.54 | 2 | 17.00, 22.00 | −2.50 \\[−8.85, +3.85] |" in markdown
    assert r"2 & 19.50 & 3.54 & 2 & 17.00, 22.00 & \(-\)2.50 {[}\(-\)8.85, +3.85{]} &" in latex
    trials = ablation_report.numbers(grid)["trials"]
    assert trials["mean"].tolist() == [17.0, 19.5, 21.0, 22.0, 27.0, 28.0]
    assert trials[["block", "head_layers"]].to_numpy().tolist()[0] == ["3", "2"]


@pytest.mark.parametrize("name", ["../../x", "/etc/x", ".."])
def test_an_axis_of_any_name_writes_inside_its_folder(copied, name):
    text = (copied / "ablation.json").read_text().replace('"block"', json.dumps(name))
    (copied / "ablation.json").write_text(text)
    for stem in table_files(ablation_report.section(load(copied))):
        assert "/" not in stem and not stem.startswith(".")


# -- sentences ------------------------------------------------------------------------------------------------------


def test_the_headline_names_the_best_levels_with_their_intervals(grid):
    assert ablation_findings.headline(grid) == [
        "An ablation of vae_repa, a grid over block and head_layers, beside sit, for SiT-nano/2 on digits, 2 seeds "
        "each, compared after 800 of 800 steps, 64 images a step.",
        f"block: the lowest mean {MAIN} is at 2, 19.50: a paired difference of −2.50 [−8.85, +3.85] to the default 1, "
        "not separated (better at 2 of 2 seeds).",
        # differences 6 and 4 of the other level: 5 +- 12.7
        f"head_layers: the default 5 has the lowest mean {MAIN}, 22.00; against it, 2 is not separated.",
        # differences -4 and -6
        "Of 6 settings of vae_repa, block 3, head_layers 2 has the lowest mean, 17.00: a paired difference of −5.00 "
        "[−17.71, +7.71] to the default, not separated (better at 2 of 2 seeds); the best of 6 is an optimistic "
        "choice.",
        "sit has 32.00, the default of vae_repa 22.00: a paired difference of −10.00 [−10.00, −10.00] to sit, better "
        "(better at 2 of 2 seeds).",
    ]


def test_one_seed_and_one_best_axis_are_said_in_words_of_their_own(tmp_path):
    study = write_ablation(tmp_path, GRID[:2], DEFAULTS, seeds=(0,))
    for cell, value in (("sit", 30.0), ("vae_repa", 20.0), ("vae_repa,head_layers=2", 25.0)):
        set_values(study, cell, value)
    block, heads = ablation_findings.headline(load(study))[1:3]
    assert block == f"block: the default 1 has the lowest mean {MAIN}, 20.00, and no other level has a value."
    assert heads.endswith("20.00; against it, 2 is without an interval, from one pair of seeds.")
    assert "Of 2 settings of vae_repa, the default has the lowest mean" in " ".join(
        ablation_findings.headline(load(study))
    )
    set_values(study, "vae_repa,head_layers=2", 15.0)
    best = ablation_findings.headline(load(study))[3]
    assert (
        best == "Of 2 settings of vae_repa, head_layers 2 has the lowest mean; the best of 2 is an optimistic choice."
    )


def test_higher_is_better_where_the_objective_says_so(copied):
    record = json.loads((copied / "ablation.json").read_text())
    (copied / "ablation.json").write_text(json.dumps({**record, "objective": "class_accuracy", "direction": "higher"}))
    for cell, value in zip(VALUES, (0.5, 0.6, 0.7, 0.9, 0.2, 0.3, 0.8), strict=True):
        set_values(copied, cell, value, value + 0.02, name="class_accuracy")
    ablation = load(copied)
    (subject,) = ablation.subjects
    assert [trial.cell for trial in ablation.scored(subject)][::5] == [
        "vae_repa,block=2",
        "vae_repa,block=2,head_layers=2",
    ]
    best = ablation_findings.headline(ablation)[1]
    assert best.startswith("block: the highest mean class_accuracy is at 2, 0.9100: a paired difference of +0.3000")
    assert "better (better at 2 of 2 seeds)" in best
    assert ablation_findings.notes(ablation) == [
        f"Settings are ranked by class_accuracy (higher is better), not by {MAIN}."
    ]


# -- partial studies ------------------------------------------------------------------------------------------------


def test_a_bias_of_many_cells_is_said_by_their_method(tmp_path):
    settings = [{"block": block} for block in range(1, 6)]
    study = load_study(write_ablation(tmp_path, settings, {"block": 1}, method="repa", seeds=(0,)))
    note = next(note for note in findings.notes(study) if "bias" in note)
    assert note.startswith("5 cells of repa are trained towards features of the efficientnet family, and ")
    assert note.endswith("the bias favours them (†).")


def test_what_is_not_there_yet_is_counted_and_named(copied):
    shutil.rmtree(copied / "vae_repa,block=3")
    edit_trial(copied, 4, state="waiting")
    edit_manifest(run_folder(copied, "vae_repa,block=2", 1), status="running")
    edit_lines(run_folder(copied, "vae_repa,block=2", 1), "eval", keep=3)
    fail(run_folder(copied, "vae_repa,head_layers=2", 0), "no memory")
    diverge(run_folder(copied, "vae_repa,block=3,head_layers=2", 0), 312, "base", kept=3)
    ablation = load(copied)
    assert num_runs(ablation) == (10, 14)
    assert "Not complete: 10 of 14 runs are over." in ablation_findings.headline(ablation)
    block, heads = ablation_tables(ablation)
    assert [row["every seed"] for row in block.rows[2:]] == ["17.00, unfinished", "waiting, waiting"]
    assert [row["n"] for row in block.rows[2:]] == ["1", "0"]
    assert heads.rows[1]["every seed"] == "failed, 28.00"
    assert block.rows[2]["reading"] == "no interval, 1 of 1 better" and block.rows[3]["reading"] == "no pair of seeds"
    sentence = ablation_findings.axis_sentence(ablation, ablation.subjects[0], ablation.subjects[0].axes[0])
    assert "at 2, 17.00 over 1 of 2 seeds" in sentence and "from one pair of seeds, which has no interval" in sentence


def test_a_study_that_has_the_control_alone_is_reported(copied):
    for cell in VALUES.keys() - {"sit"}:
        shutil.rmtree(copied / cell)
    ablation = load(copied)
    text = " ".join(ablation_findings.headline(ablation))
    assert "2 of 14 runs are over" in text and "block: no level has a value yet." in text
    assert "sit has 32.00; the default of vae_repa has no value there yet." in text
    assert ablation.shown_cells() == ("sit",)
    assert ablation_tables(ablation)[0].rows[1]["every seed"] == "waiting, waiting"


def test_curves_show_control_default_best_and_worst(grid):
    assert grid.shown_cells() == ("sit", "vae_repa", "vae_repa,block=3,head_layers=2", "vae_repa,block=3")


# -- searches -------------------------------------------------------------------------------------------------------

SEARCHED = [{"block": b, "head_layers": 5} for b in (1, 2, 3, 2, 4, 5)]


@pytest.fixture
def search_path(tmp_path):
    study = write_ablation(tmp_path, SEARCHED, DEFAULTS, kind="search", study="tpe", pruner="median", trials=8)
    edit_trial(study, 1, workers=["host:1", "other:7"])
    for block, value in (("", 20.0), (",block=2", 15.0), (",block=3", 18.0)):
        set_values(study, f"vae_repa{block}", value, value + 2)
    edit_trial(study, 3, spent={"budget": 0.0})
    for number, block, points, share in ((4, 4, 2, 0.125), (5, 5, 4, 0.25)):
        prune(run_folder(study, f"vae_repa,block={block}", 0), points)
        shutil.rmtree(run_folder(study, f"vae_repa,block={block}", 1).path)
        edit_trial(study, number, state="pruned", value=None, intermediate={"1": 90.5}, spent={"budget": share})
    return study


def test_trials_stand_best_first_beside_default_and_control(search_path):
    ablation = load(search_path)
    (table,) = ablation_tables(ablation)
    assert [row["trial"] for row in table.rows] == ["sit", "0 (default)", "1", "2", "4", "5"]
    assert [row["mean"] for row in table.rows[1:]] == ["21.00", "16.00", "19.00", "–", "–"]
    assert [row["state"] for row in table.rows] == ["", "complete", "complete", "complete", "pruned", "pruned"]
    assert [row["every seed"] for row in table.rows[4:]] == ["pruned, waiting"] * 2
    # all trials are in the numbers, duplicates behind the first of their setting
    assert [line.get("trial") for line in table.numbers] == [None, 1, 3, 2, 0, 4, 5]
    assert [line["is_duplicate"] for line in table.numbers[1:]] == [False, True, False, False, False, False]
    assert [trial.number for trial in duplicates(ablation.trials)] == [3]


def test_a_pruned_trial_with_a_value_at_one_seed_is_not_ranked(search_path):
    edit_trial(search_path, 1, state="pruned")
    edit_manifest(run_folder(search_path, "vae_repa,block=2", 0), status="pruned")
    shutil.rmtree(run_folder(search_path, "vae_repa,block=2", 1).path)
    ablation = load(search_path)
    rows = ablation_tables(ablation)[0].rows
    assert [(row["trial"], row["mean"]) for row in rows[1:4]] == [
        ("0 (default)", "21.00"),
        ("2", "19.00"),
        ("1", "15.00"),
    ]
    assert ablation.shown_cells() == ("sit", "vae_repa", "vae_repa,block=3")
    assert "Of 2 settings of vae_repa, block 3 has the lowest mean, 19.00" in " ".join(
        ablation_findings.headline(ablation)
    )


def test_what_pruning_saved_is_counted_in_budget(search_path):
    ablation = load(search_path)
    # (1 - 0.125) + (1 - 0.25) = 1.625 trials of 2 seeds x 800 steps, of five settings
    assert saved(ablation, ablation.subjects[0]) == pytest.approx((2600.0, 0.325))
    notes = ablation_tables(ablation)[0].notes
    assert notes[0] == "6 of 8 trials of vae_repa are over, 2 pruned and 1 of a setting that had been tried."
    assert "Median pruning saved 2,600 steps, 32% of what these trials would have spent." in notes
    assert any(f"ditbench compare --tuned {search_path}" in note and "seeds 0,1" in note for note in notes)
    assert any("order cannot be reproduced" in note for note in notes)
    assert "Not complete: 6 of 8 trials of vae_repa are over." in ablation_findings.headline(ablation)


def test_a_search_by_one_worker_can_be_reproduced(search_path):
    record = json.loads((search_path / "ablation.json").read_text())
    (search_path / "ablation.json").write_text(json.dumps({**record, "pruner": "none"}))
    edit_trial(search_path, 1, workers=["host:1"])
    notes = " ".join(ablation_tables(load(search_path))[0].notes)
    assert "reproduced" not in notes and "saved" not in notes


def test_methods_searched_together_have_a_table_each(search_path):
    settings = [{"block": block} for block in (1, 2)]
    both = json.loads((search_path / "ablation.json").read_text())
    write_ablation(search_path.parent, settings, {"block": 1}, method="repa", kind="search", study="tpe")
    set_values(search_path, "repa,block=2", 10.0, 11.0)
    other = json.loads((search_path / "ablation.json").read_text())
    both["methods"] |= other["methods"]
    both["trial_list"] += other["trial_list"]
    write_json(search_path / "ablation.json", both)
    ablation = load(search_path)
    assert [(table.stem, len(table.numbers)) for table in ablation_tables(ablation)] == [
        ("trials_repa", 3),
        ("trials_vae_repa", 7),
    ]
    assert ablation.shown_cells() == ("sit", "repa", "repa,block=2", "vae_repa", "vae_repa,block=2")
    # repa is trained towards features of the extractor's family
    assert ablation_tables(ablation)[0].rows[1]["mean"].endswith(" †")
    assert any(note.startswith("† The method was trained towards") for note in ablation_tables(ablation)[0].notes)
    text = " ".join(ablation_findings.headline(ablation))
    assert "An ablation of repa, a search over block; vae_repa, a search over block and head_layers, beside sit" in text
    assert "Not complete: 2 of 8 trials of repa and 6 of 8 trials of vae_repa are over." in text
    assert [plan.stem for plan in ablation_report.section(ablation).all_plans] == [
        "history",
        "parallel_1",
        "parallel_2",
    ]


def test_long_searches_are_cut_in_text_and_whole_in_numbers(tmp_path):
    settings = [{"block": b, "head_layers": h} for b, h in itertools.product(range(1, 6), range(1, 6))]
    defaults = {"block": 1, "head_layers": 1}
    study = write_ablation(
        tmp_path, settings, defaults, lambda s, seed: -5.0 * s["block"] - s["head_layers"], kind="search", seeds=(0,)
    )
    ablation = load(study)
    table = search_table(ablation, ablation.subjects[0])
    assert len(table.rows) == 2 + 20 and len(table.numbers) == 1 + 25
    assert any(note.startswith("The first 20 settings are shown") for note in table.notes)
    assert [len(rows) for _, rows in terminal_tables(study)] == [12]


# -- records that cannot be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": 3}, "has format 3 and this version reads 1 to 2"),
        ({"seeds": None}, "seeds is null where a list belongs"),
        ({"methods": {"vae_repa": {}}}, "methods.vae_repa lacks default_cell"),
        ({"objective": "kid_x_9"}, "ranks by kid_x_9, which no run recorded: there are fd_efficientnet_lite0_898"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(copied, fields, reason):
    record = json.loads((copied / "ablation.json").read_text())
    (copied / "ablation.json").write_text(json.dumps({**record, **fields}))
    with pytest.raises(UserError, match=reason) as error:
        load(copied)
    assert "ablation.json" in str(error.value) and "\n" not in str(error.value)


def test_without_an_objective_yet_the_main_metric_counts(copied):
    record = json.loads((copied / "ablation.json").read_text())
    (copied / "ablation.json").write_text(json.dumps({**record, "objective": ""}))
    assert load(copied).objective == MAIN


# -- pruned and tuned runs in any study -----------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path):
    return write_study(tmp_path, {"sit": "sit", "vae_repa": "vae_repa"})


def test_a_pruned_run_ended_early_and_did_not_fail(compared):
    prune(run_folder(compared, "vae_repa", 1), 3)
    study = load_study(compared)
    assert verify(study)
    assert endings(study) == []
    curves = metric_curves(study, MAIN)
    assert not (curves["series"] == "stop").any()
    own = curves[(curves["cell"] == "vae_repa") & (curves["series"] == "seed") & (curves["seed"] == 1)]
    assert own["point"].tolist() == [1, 2, 3]
    table = results.final_table(study).set_index("cell")
    assert table["num_pruned"].to_dict() == {"sit": 0, "vae_repa": 1}
    assert results.terminal_rows(study)[1]["every seed"].endswith(", pruned; 1 of 2 seeds")


TUNING = {
    "study": "tpe",
    "id": "0123",
    "kind": "search",
    "trials": 40,
    "seeds": [2, 3],
    "setting": {"block": 2},
    "value": 15.0,
    "objective": MAIN,
}


def test_where_tuned_settings_come_from_is_said(compared):
    for seed in (0, 1):
        edit_manifest(run_folder(compared, "vae_repa", seed), tuning=TUNING)
    study = load_study(compared)
    verify(study)
    text = "on seeds 2, 3 of study tpe: best of 40 trials"
    assert ("Tuned", [[], [text]]) in methods.methods_table(study)
    assert f"vae_repa was tuned {text}." in findings.notes(study)


def test_a_seed_that_was_tuned_on_is_not_reported(compared):
    edit_manifest(run_folder(compared, "vae_repa", 1), tuning={**TUNING, "seeds": [1, 2]})
    with pytest.raises(
        UserError, match="vae_repa seed 1: its settings were tuned on seed 1 in study tpe, so its value"
    ):
        verify(load_study(compared))


def test_the_trials_of_a_grid_are_a_csv_with_every_setting(grid, tmp_path):
    ablation_report.numbers(grid)["trials"].to_csv(tmp_path / "trials.csv", index=False)
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["block"], row["head_layers"]): float(row["mean"]) for row in rows} == {
        ("1", "5"): 22.0,
        ("1", "2"): 27.0,
        ("2", "5"): 19.5,
        ("2", "2"): 21.0,
        ("3", "5"): 28.0,
        ("3", "2"): 17.0,
    }
